"""The channel weights of images in files and figures, and the figures of predictions and of a training run."""
import csv
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers.image_folders import draw
from helpers.networks import randomize_norms
from safetensors.torch import load_file
from timm.models import create_model, save_for_hf

import timm_eca
from timm_eca.analysis.gates_report import class_means, describe_gates, last_of_stages, title_of
from timm_eca.commands.main import main
from timm_eca.errors import TimmEcaError

pytest.importorskip('matplotlib')

import matplotlib

from timm_eca.analysis.evaluate import Evaluation, Result
from timm_eca.analysis.figures import draw_confusion, draw_curves, draw_gates


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """No figure warns, or changes matplotlib's settings."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield
    assert dict(matplotlib.rcParams) == before


def texts(path: Path) -> list[str]:
    """The texts in an SVG. matplotlib writes them as comments beside their outlines."""
    return re.findall(r'<!-- (.*?) -->', path.read_text(encoding='utf-8'))


def save_model(folder: Path, scale: float) -> Path:
    """A model whose ECA has random weights, or zeros."""
    torch.manual_seed(0)
    model = randomize_norms(create_model('eca_test_resnet', num_classes=3))
    for module in model.modules():
        if isinstance(module, timm_eca.EfficientChannelAttention):
            torch.nn.init.normal_(module.conv.weight, 0, scale)
    save_for_hf(model, folder, safe_serialization=True, data_config={'input_size': (3, 32, 32)})
    return folder


def random_gates(count: int, layers: int = 1) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Random channel weights of one image for each of some classes."""
    generator = torch.Generator().manual_seed(0)
    collected = {f'layer{i}.0': torch.rand(count, 6, generator=generator) for i in range(1, layers + 1)}
    return collected, [Path(f'class{i}/image.png') for i in range(count)]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = draw(tmp_path / 'images', {'c10': 1, 'c2': 2})
    model, out = save_model(tmp_path / 'model', 1.0), tmp_path / 'out'
    arguments = ['gates', str(images), '--model', str(model), '--output', str(out), '--format', 'svg', '-b', '2']
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ['layer', 'channels', 'mean', 'lowest', 'highest', 'deviation', 'between', 'images']
    assert 'constant' not in ''.join(printed)
    assert printed[-3:] == [str(out / name) for name in ('gates.safetensors', 'gates.csv', 'gates.svg')]
    assert {path.name for path in out.iterdir()} == {'gates.safetensors', 'gates.csv', 'gates.svg'}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    tensors = load_file(out / 'gates.safetensors')
    assert [name[:6] for name in tensors] == ['layer1', 'layer2', 'layer3', 'layer4']
    assert {f'stage {stage}, block 0' for stage in range(1, 5)} <= set(texts(out / 'gates.svg'))
    with (out / 'gates.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['layer', 'channel', 'c2', 'c10']  # as `finetune` sorts them
    assert len(rows) == sum(values.shape[1] for values in tensors.values())
    first = tensors['layer1.0.bn2.attn']
    assert first.shape[0] == 3
    assert float(rows[3]['c2']) == pytest.approx(first[:2, 3].mean().item(), abs=1e-6)
    row = next(line.split() for line in printed if line.startswith('layer1.0.bn2.attn'))
    assert row[3:5] == [f'{first.min():.4f}', f'{first.max():.4f}']

    assert main([*arguments, '--sort', '--layers', 'layer4', 'layer[12].*']) == 0
    assert 'channel, sorted by mean weight' in texts(out / 'gates.svg')
    assert [name[:6] for name in load_file(out / 'gates.safetensors')] == ['layer1', 'layer2', 'layer4']
    assert sum(text.startswith('stage') for text in texts(out / 'gates.svg')) == 3
    assert main([*arguments, '--layers', 'blocks.9']) == 2
    assert 'No ECA layer is called blocks.9' in capsys.readouterr().err


def test_constant_channel_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Noise does not look like attention, and words say so."""
    images, model = draw(tmp_path / 'images', {'a': 1, 'b': 1}), save_model(tmp_path / 'model', 0.0)
    assert main(['gates', str(images), '--model', str(model), '--output', str(tmp_path), '--format', 'svg']) == 0
    printed = capsys.readouterr().out
    assert 'Channel weights: 0.5000 to 0.5000, standard deviation between images 0.0000.' in printed
    assert 'constant (differ by less than 0.01) in all 4 layers: ECA has learned nothing' in printed
    drawn = texts(tmp_path / 'gates.svg')
    assert sum(text.endswith('(constant)') for text in drawn) == 4
    assert {'0.400', '0.600'} <= set(drawn)
    collected = {'layer1': torch.tensor([[0.4998], [0.5004]]), 'layer2': torch.tensor([[0.4], [0.6]])}
    described = describe_gates(collected)
    assert described.startswith('0.4000 to 0.6000, standard deviation between images 0.0502. They are constant')
    assert 'in 1 of 2 layers (layer1): ' in described
    assert describe_gates({'layer2': collected['layer2']}).endswith('differ by more than 0.01 in each of the 1 layers.')


def test_last_layer_of_each_stage():
    names = ['s1.b1.se', 's1.b2.se', 'layer2.0.bn3.attn', 'layer2.1.bn3.attn', 'stages.0.blocks.0.attn', 'stages.1.0']
    collected = {name: torch.zeros(1, 1) for name in names}
    last = ['s1.b2.se', 'layer2.1.bn3.attn', 'stages.0.blocks.0.attn', 'stages.1.0']
    assert list(last_of_stages(collected)) == last
    assert [title_of(name) for name in (*last, 'stem.conv1.bn1.attn')] == [
        'stage 1, block 2', 'stage 2, block 1', 'stage 0, block 0', 'stage 1, block 0', 'stem.conv1.bn1.attn']


def test_means_over_classes():
    collected, images = random_gates(4)
    images[2] = images[0].with_name('other.png')
    classes, means = class_means(collected, images)
    assert classes == ['class0', 'class1', 'class3']
    torch.testing.assert_close(means['layer1.0'][0], collected['layer1.0'][[0, 2]].mean(0))


@pytest.mark.parametrize(('count', 'heat_map'), [(1, False), (3, False), (100, True)])
def test_lines_or_a_heat_map(count: int, heat_map: bool, tmp_path: Path):
    draw_gates(tmp_path / 'gates.svg', *random_gates(count, layers=4))
    drawn = texts(tmp_path / 'gates.svg')
    assert drawn.count('mean channel weight') == 1
    names = [text for text in drawn if text.startswith('class')]
    assert ('<image' in (tmp_path / 'gates.svg').read_text()) == heat_map
    if heat_map:  # beside both rows of panels
        assert names == 2 * [f'class{i}' for i in range(0, count, 3)]
    else:
        assert names == [f'class{i}' for i in range(count)] * (count > 1)


def test_names_are_no_formulas_and_not_too_long(tmp_path: Path):
    names = ['a$b$c_{2}', 'cafe\u0301', 'x\u202ey', 'long ' * 40, '#%\\']
    draw_gates(tmp_path / 'gates.svg', random_gates(5)[0], [Path(name, 'x') for name in names])
    drawn = set(texts(tmp_path / 'gates.svg'))
    assert {'a$b$c_{2}', 'cafe\u0301', 'x\\u202ey', f'{("long " * 8).strip()} ...'} <= drawn


def test_names_in_any_script(tmp_path: Path):
    """matplotlib takes the fonts of its settings in turn. A character that none of them has is escaped."""
    names, matrix = ['قطة', 'x⌒', '猫'], torch.eye(3, dtype=torch.int64)
    with matplotlib.rc_context({'font.family': ['DejaVu Sans']}):
        draw_confusion(tmp_path / 'confusion.svg', matrix, names)
        assert {'قطة', 'x\\u2312', '\\u732b'} <= set(texts(tmp_path / 'confusion.svg'))
    with matplotlib.rc_context({'font.family': ['DejaVu Sans', 'STIXGeneral']}):
        draw_confusion(tmp_path / 'confusion.svg', matrix, names)
        assert 'x⌒' in texts(tmp_path / 'confusion.svg')


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(TimmEcaError, match=r'x.png needs matplotlib: pip install .*\[plot\]'):
        draw_curves(tmp_path / 'x.png', [dict(epoch=1)], 1)


def confusion(targets: Sequence[int], predictions: Sequence[int], names: Sequence[str]) -> torch.Tensor:
    return Evaluation([Result(t, p, 0, True) for t, p in zip(targets, predictions)], names).confusion_matrix()


def test_settings_for_formulas(tmp_path: Path):
    """LaTeX is not needed for names, whatever the user's settings are."""
    with matplotlib.rc_context({'text.usetex': True}):
        draw_confusion(tmp_path / 'confusion.pdf', torch.tensor([[1, 0], [1, 0]]), ['a_b', '50% #$1'])
    assert (tmp_path / 'confusion.pdf').read_bytes().startswith(b'%PDF')


def test_confusion(tmp_path: Path):
    names = ['cat', 'dog', 'none']
    matrix = confusion([0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], names)
    draw_confusion(tmp_path / 'confusion.svg', matrix, names)
    drawn = texts(tmp_path / 'confusion.svg')
    assert 'Confusion matrix: 6 images, 83.33 % correct' in drawn
    assert [text for text in drawn if text in '0123456789'] == ['2', '1', '3']
    assert [text for text in drawn if text in names] == 2 * names


def test_confusion_of_many_classes(tmp_path: Path):
    """The figure names them, and leaves out the counts."""
    names = [f'class{i}' for i in range(31)]
    draw_confusion(tmp_path / 'confusion.svg', confusion(range(31), range(31), names), names)
    assert texts(tmp_path / 'confusion.svg').count('class30') == 2
    assert '1' not in texts(tmp_path / 'confusion.svg')


def test_curves(tmp_path: Path):
    rows: list[dict[str, float]] = [dict(epoch=i, train_loss=2 / i, loss=3 / i, top1=50, top5=90) for i in (1, 2)]
    draw_curves(tmp_path / 'curves.svg', rows, 2)
    assert {'training', 'validation', 'top-1', 'top-5', 'kept'} <= set(texts(tmp_path / 'curves.svg'))
    for row in rows:
        del row['top5']
    draw_curves(tmp_path / 'curves.svg', rows, 2)
    assert 'top-5' not in texts(tmp_path / 'curves.svg')
