"""`timm-eca predict` and `timm-eca gates`, on folders of images that these tests draw."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.forked import run_command
from helpers.image_folders import draw
from helpers.networks import randomize_norms
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, save_for_hf

import timm_eca
from timm_eca import add_eca
from timm_eca.commands.main import main

NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six']


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with seven classes, as `save_for_hf` leaves it, for reading."""
    folder = tmp_path_factory.mktemp('predict') / 'model'
    torch.manual_seed(0)
    model = randomize_norms(create_model('eca_test_resnet', num_classes=7))
    save_for_hf(
        model, folder, safe_serialization=True, data_config={'input_size': (3, 32, 32)},
        model_config={'label_names': NAMES})
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images in two folders: grey, with transparency, large, and in other formats; and a text file."""
    generator = torch.Generator().manual_seed(0)
    for name, mode, size in [
        ('a/1.png', 'RGB', (40, 30)), ('a/2.jpg', 'L', (300, 200)), ('b/3.png', 'RGBA', (64, 64)),
        ('b/4.bmp', 'RGB', (1, 1)), ('b/deep/5.webp', 'RGB', (500, 20)),
    ]:
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = {'RGB': 3, 'L': 1, 'RGBA': 4}[mode]
        data = torch.randint(0, 256, (size[1], size[0], channels), generator=generator, dtype=torch.uint8)
        Image.frombytes(mode, size, bytes(data.flatten().tolist())).save(path)
    (tmp_path / 'images' / 'notes.txt').write_text('not an image')
    return tmp_path / 'images'


def test_predictions_are_the_models(folder: Path, images: Path, capsys: pytest.CaptureFixture):
    assert main(['predict', str(images), '--model', str(folder), '--json', '--batch-size', '2', '--topk', '3']) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(row['image']).name for row in found] == ['1.png', '2.jpg', '3.png', '4.bmp', '5.webp']
    model = create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    assert main(['predict', found[0]['image'], '--model', str(folder)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == found[0]['image']
    assert [row.split()[1] for row in rows[:3]] == [p['name'] for p in found[0]['predictions']]
    assert len(rows) == 5
    assert rows[0].split()[0].endswith('%')
    for row in found:
        with torch.no_grad():
            probabilities = model(transform(Image.open(row['image']).convert('RGB'))[None]).softmax(-1)[0]
        values, classes = probabilities.topk(3)
        assert [p['class'] for p in row['predictions']] == classes.tolist()
        assert [p['name'] for p in row['predictions']] == [NAMES[c] for c in classes]
        torch.testing.assert_close(
            torch.tensor([p['probability'] for p in row['predictions']]), values, atol=2e-5, rtol=0)


def test_unreadable_images_are_left_out(folder: Path, images: Path, capsys: pytest.CaptureFixture):
    """Each is named, and the exit status tells. Files that systems leave are not, nor are texts."""
    whole = (images / 'a' / '2.jpg').read_bytes()
    (images / 'a' / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (images / 'a' / 'text.png').write_text('no image')
    (images / 'a' / 'x.mp4').write_bytes(b'video')
    Image.new('F', (8, 8), 0.5).save(images / 'a' / 'float.tif')
    # Pillow alone would read these, whatever their name.
    for kind in ('PCX', 'SGI', 'TGA', 'DDS'):
        Image.new('RGB', (16, 16)).save(images / 'b' / f'{kind}.jpg', format=kind)
    for name in ('.ipynb_checkpoints/1.png', '@eaDir/1.png', '._1.png', 'Thumbs.db'):
        path = images / 'a' / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'junk')
    for command in ('predict', 'gates'):
        assert main([command, str(images), str(images / 'notes.txt'), '--model', str(folder)]) == 1
        printed = capsys.readouterr()
        assert sorted(re.findall(r'left out, can\'t be read: .*/(.*?): ', printed.err)) == [
            'DDS.jpg', 'PCX.jpg', 'SGI.jpg', 'TGA.jpg', 'cut.jpg', 'float.tif', 'notes.txt', 'text.png', 'x.mp4']
        assert printed.err.count('not an image of a common format') >= 4
        assert command == 'gates' or printed.out.count(str(images)) == 5


def test_sixteen_bits_are_not_white(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / 'images').mkdir()
    row = list(range(0, 256, 16))
    eight, sixteen = Image.new('L', (16, 16)), Image.new('I;16', (16, 16))
    eight.putdata(row * 16)
    sixteen.putdata([value * 256 + 7 for value in row] * 16)
    eight.save(tmp_path / 'images' / '8.png')
    sixteen.save(tmp_path / 'images' / '16.png')
    assert main(['predict', str(tmp_path / 'images'), '--model', str(folder), '--json']) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first['predictions'] == second['predictions']


def test_nothing_readable(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / 'text.png').write_text('no image')
    assert main(['predict', str(tmp_path / 'text.png'), '--model', str(folder), '--json']) == 1
    assert json.loads(capsys.readouterr().out) == []
    assert main(['gates', str(tmp_path / 'text.png'), '--model', str(folder), '--output', str(tmp_path / 'out')]) == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('arguments', 'words'), [
    (['absent.png', '--model', 'eca_resnet18'], 'absent.png does not exist'),
    (['{empty}', '--model', 'eca_resnet18'], 'has no images'),
    (['{images}', '--model', 'eca_resnet18'], 'timm-eca convert'),
    (['{images}', '--model', 'eca_resnet5O'], 'no model eca_resnet5O: did you mean eca_resnet50'),
    (['{images}', '--model', '{empty}'], 'is not the config of a model'),
    (['{images}', '--model', 'hf-hub:nobody/nothing'], 'can\'t be downloaded'),
    (['{images}', '--model', '{folder}', '--device', 'nonsense'], 'nonsense'),
])
def test_bad_input(
        arguments: list[str], words: str, folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / 'empty').mkdir()
    places = dict(empty=tmp_path / 'empty', images=images, folder=folder)
    assert main(['predict', *(a.format(**places) for a in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_images_that_the_model_cannot_take(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The config of a folder may name a size that does not fit its network."""
    draw(tmp_path / 'images', {'red': 2, 'green': 2})
    save_for_hf(create_model('eca_halonet26t', num_classes=2), tmp_path / 'model')
    path = tmp_path / 'model' / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['input_size'] = [3, 72, 72]  # its attention blocks don't fit this size
    path.write_text(json.dumps(config))
    assert main(['predict', str(tmp_path / 'images'), '--model', str(tmp_path / 'model')]) == 2
    error = capsys.readouterr().err
    assert f'the model {tmp_path / "model"} can\'t be loaded' in error
    assert error.count('\n') == 1


def gates_by_equation(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each ECA layer multiplies its input by."""
    found = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out, name=name: found.update({name: (out / args[0])[:, :, 0, 0]}))
        for name, layer in model.named_modules() if name.endswith('.attn')
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def test_gates(folder: Path):
    model = create_model(f'local-dir:{folder}', pretrained=True).train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(3, 3, 64, 64)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    found = timm_eca.gates(model, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())
    wanted = gates_by_equation(model.eval(), x)
    assert list(found) == list(wanted)
    assert len(found) == 4
    for name, values in found.items():
        assert values.shape == (3, model.get_submodule(f'{name.removesuffix("attn")}norm').num_features)
        # Where the map is 0 at its first position, 0 / 0 says nothing.
        known = wanted[name].isfinite()
        assert known.float().mean() > 0.9
        torch.testing.assert_close(values[known], wanted[name][known], rtol=1e-4, atol=1e-5)


def test_gates_of_warm_starts_other_models_and_none():
    x = torch.randn(2, 3, 64, 64)
    warm = timm_eca.gates(add_eca(create_model('test_resnet')), x)
    assert all((values == 0.5).all() for values in warm.values())
    assert len(timm_eca.gates(create_model('test_resnet', block_args={'attn_layer': 'eca'}), x)) == 4  # timm's own
    with pytest.raises(ValueError, match='no ECA'):
        timm_eca.gates(create_model('test_resnet'), x)


def test_folders_that_do_not_fit(folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_for_hf(create_model('test_resnet', num_classes=3), tmp_path / 'plain')
    assert main(['gates', str(images), '--model', str(tmp_path / 'plain')]) == 2
    assert 'no ECA' in capsys.readouterr().err
    hostile = shutil.copytree(folder, tmp_path / 'hostile')
    save_file({'x': torch.zeros(1)}, hostile / 'model.safetensors')
    assert main(['predict', str(images), '--model', str(hostile)]) == 2
    assert 'can\'t be loaded' in capsys.readouterr().err


def test_names_of_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a dict by their numbers, and never as commands to the terminal; a model without classes has no predictions."""
    image, small = str(images / 'a' / '1.png'), {'input_size': (3, 32, 32)}
    save_for_hf(
        create_model('eca_test_resnet', num_classes=3), tmp_path / 'dict', safe_serialization=True, data_config=small,
        model_config={'label_names': {0: 'cat', 1: '\x1b[31mdog', 2: 7}})
    assert main(['predict', image, '--model', str(tmp_path / 'dict')]) == 0
    printed = capsys.readouterr().out
    assert 'cat' in printed
    assert '\\x1b[31mdog' in printed
    assert '\x1b[31m' not in printed
    for pool in ('avg', ''):
        model = create_model('eca_test_resnet', num_classes=0, global_pool=pool)
        save_for_hf(model, tmp_path / f'none{pool}', safe_serialization=True, data_config=small)
        assert main(['predict', image, '--model', str(tmp_path / f'none{pool}')]) == 2
        assert 'no classes' in capsys.readouterr().err


def test_file_names_of_any_bytes(folder: Path, tmp_path: Path):
    """Which no encoding has a text for, as in a terminal of another one."""
    pytest.importorskip('matplotlib')
    (tmp_path / 'gr\u00fcn').mkdir()
    image = os.fsdecode(os.fsencode(tmp_path / 'gr\u00fcn') + b'/caf\xe9.png')
    Image.new('RGB', (16, 16)).save(image)
    for encoding, arguments in (
            ('ascii', ['predict', image, '--model', folder, '--json']),
            ('utf-8', ['predict', image, '--model', folder]),
            ('utf-8', ['gates', image, '--model', folder, '--output', tmp_path / 'gates'])):
        status, printed = run_command(
            arguments, before=lambda encoding=encoding: sys.stdout.reconfigure(encoding=encoding, errors='strict'))
        assert status == 0, printed
        if encoding == 'ascii':
            assert json.loads(printed)[0]['image'] == image
