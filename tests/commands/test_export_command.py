"""`timm-eca export`: folders that timm, transformers and the Hub load without this package."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_double import HubDouble
from helpers.image_folders import draw
from helpers.networks import image, randomize_norms
from helpers.official_files import official_state_dict, save_official
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import create_model, save_for_hf
from timm.models.resnet import Bottleneck

from timm_eca.commands.convert import _push
from timm_eca.commands.main import main
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.settings import Settings
from timm_eca.layers.norm_attn import named_norm_attn

NAMES = ['cat', 'dog', 'owl']
# What others do with a folder, where timm_eca can't be imported.
OTHERS = """
import sys
sys.modules['timm_eca'] = None
import timm
import torch
from transformers import AutoModelForImageClassification
folder, images, output = sys.argv[1:]
x, name = torch.load(images), f'local-dir:{folder}'
with torch.inference_mode():
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    found = {'transformers': model(x).logits, 'labels': model.config.id2label}
    found['features'] = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
    found['embeddings'] = timm.create_model(name, pretrained=True, num_classes=0).eval()(x)
    found['grey'] = timm.create_model(name, pretrained=True, in_chans=1).eval()(x[:, :1])
    found['seven'] = timm.create_model(name, pretrained=True, num_classes=7).eval()(x)
    found['trunk'] = timm.create_model(name, pretrained=True, num_classes=7).eval().forward_features(x)
    found['trunk of all'] = timm.create_model(name, pretrained=True).eval().forward_features(x)
torch.save(found, output)
"""


@pytest.fixture(scope='module')
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder as `finetune` writes it, but for its card."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('runs') / 'finetuned'
    model = randomize_norms(create_model('eca_test_resnet', num_classes=3, kernel_sizes=3))
    save_for_hf(
        model, folder, safe_serialization=True, data_config={'mean': (0.1, 0.2, 0.3), 'input_size': (3, 64, 64)},
        model_config={'label_names': NAMES, 'pretrained_cfg': {'license': 'apache-2.0'}})
    return folder


@pytest.fixture(scope='module')
def exported(finetuned: Path) -> Path:
    output = finetuned.with_name('exported')
    assert main(['export', str(finetuned), '--output', str(output)]) == 0
    return output


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'config.json').read_text())


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The sentence on stderr of a command that refuses its input."""
    assert main([*map(str, args)]) == 2
    message = capsys.readouterr().err
    assert message.startswith('timm-eca: ')
    assert message.count('\n') == 1
    return message


def test_folder_of_a_run(finetuned: Path, exported: Path, capsys: pytest.CaptureFixture[str]):
    config, source = read_config(exported), read_config(finetuned)
    assert config['architecture'] == 'test_resnet'
    assert config['model_args'] == {'in_chans': 3, 'global_pool': 'avg', 'block_args': {'attn_layer': 'eca'}}
    assert config['label_names'] == NAMES
    assert config['pretrained_cfg'] == source['pretrained_cfg']
    assert config['pretrained_cfg']['license'] == 'apache-2.0'
    assert sorted(path.name for path in exported.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    card = ModelCard.load(exported / 'README.md')
    assert card.data.license == 'apache-2.0'
    assert card.data.library_name == 'timm'
    assert 'timm_eca\n' not in card.content
    assert 'pip install' not in card.content
    assert "timm.create_model('local-dir:.', pretrained=True)" in card.content

    model, stock = (create_model(f'local-dir:{folder}', pretrained=True).eval() for folder in (finetuned, exported))
    assert not list(named_norm_attn(stock))
    with torch.inference_mode():
        assert torch.equal(stock(image()), model(image()))
    assert main(['verify', str(exported)]) == 0
    assert 'equal to their recorded digests' in capsys.readouterr().out


@pytest.mark.slow
def test_others_load_it_without_this_package(finetuned: Path, exported: Path, tmp_path: Path):
    pytest.importorskip('transformers')
    torch.save(image(), tmp_path / 'images.pt')
    arguments = [str(exported), str(tmp_path / 'images.pt'), str(tmp_path / 'found.pt')]
    subprocess.run([sys.executable, '-c', OTHERS, *arguments], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / 'found.pt')

    def load(**kwargs: Any) -> Any:
        return create_model(f'local-dir:{finetuned}', pretrained=True, **kwargs).eval()

    with torch.inference_mode():
        assert torch.equal(found['transformers'], load()(image()))
        assert list(found['labels'].values()) == NAMES
        features = load(features_only=True)(image())
        assert len(found['features']) == len(features)
        assert all(map(torch.equal, found['features'], features))
        assert torch.equal(found['embeddings'], load(num_classes=0)(image()))
        assert torch.equal(found['grey'], load(in_chans=1)(image()[:, :1]))
    assert found['seven'].shape == (2, 7)
    assert torch.equal(found['trunk'], found['trunk of all'])


@pytest.mark.slow
def test_published_weights_of_the_authors(
        tmp_path: Path, home: Path, hub: HubDouble, capsys: pytest.CaptureFixture[str]):
    """The Hub gets timm's own form. `hf-hub:` gives timm's model, and the registered name this package's."""
    file = save_official(tmp_path / 'eca_resnet50_k3557.pth.tar', official_state_dict('eca_resnet50'))
    name = 'eca_resnet50.bangguwu_in1k'
    assert main(['convert', str(file), '--official']) == 0
    converted, output = home / name, home / '.exported' / name
    _push(converted, f'timm-eca/{name}')
    _push(converted, f'timm-eca/{name}')
    assert 'no commit made' in capsys.readouterr().out
    metadata = []
    for folder in (converted, output):
        with safe_open(folder / 'model.safetensors', framework='pt') as weights:
            metadata.append(weights.metadata())
    assert metadata[1]['format'] == 'pt'
    kept = ('source', 'source_sha256', 'provenance', 'tool_version')
    assert [metadata[1].get(key) for key in kept] == [metadata[0].get(key) for key in kept]
    config = read_config(output)
    assert config['architecture'] == 'resnet50'
    assert config['model_args']['block_args'] == {'attn_layer': 'eca'}
    wanted = read_config(converted)['pretrained_cfg']
    assert config['pretrained_cfg'] == {key: value for key, value in wanted.items() if value is not None}
    card = ModelCard.load(output / 'README.md')
    assert card.data.eval_results == ModelCard.load(converted / 'README.md').data.eval_results
    assert metadata[1]['kernel_sizes'] == '3, 5, 5, 7'
    assert main(['verify', str(output), '--checkpoint', str(file)]) == 0
    assert f'converted from {file.name}' in capsys.readouterr().out

    source = load_file(converted / 'model.safetensors')
    shutil.rmtree(home)
    stock = create_model(f'hf-hub:timm-eca/{name}', pretrained=True).eval()
    assert type(stock.layer1[0]) is Bottleneck
    model = create_model('eca_resnet50', pretrained=True).eval()
    assert [place.attn.conv.kernel_size[0] for _, place in named_norm_attn(model)] == [3] * 3 + [5] * 10 + [7] * 3
    assert model.pretrained_cfg['architecture'] == 'eca_resnet50'
    assert model.state_dict().keys() == source.keys()
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model(image()), stock(image()))


def test_finetuning_starts_from_it(finetuned: Path, exported: Path):
    settings = Settings(
        'photos', model='eca_test_resnet', initial_checkpoint=str(exported), in_chans=3)
    sizes = [place.attn.conv.kernel_size[0] for _, place in named_norm_attn(create_model('eca_test_resnet'))]
    assert sizes != [3] * len(sizes)
    model, start = create_with_weights(settings, NAMES)
    assert start == 'the weights exported'
    stock = create_model(f'local-dir:{exported}', pretrained=True)
    with torch.inference_mode():
        found, wanted = (network.eval().forward_features(image()) for network in (model, stock))
    assert torch.equal(found, wanted)
    assert model.pretrained_cfg['license'] == 'apache-2.0'


def test_predict_takes_it(finetuned: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = draw(tmp_path / 'images', {'red': 1, 'green': 1})
    printed = []
    for folder in (finetuned, exported):
        assert main(['predict', str(images), '--model', str(folder)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert 'owl' in printed[0]


def test_replaces_only_with_force(
        finetuned: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = ('README.md', 'config.json')  # safetensors writes its metadata in any order
    before = [(exported / name).read_bytes() for name in texts]
    exported = Path(shutil.copytree(exported, tmp_path / 'copy'))
    (exported / 'config.json').write_text('{}')
    assert 'exists: name another --output, or replace it with --force.' in refused(
        capsys, 'export', finetuned, '--output', exported)
    assert main(['export', str(finetuned), '--output', str(exported), '--force']) == 0
    assert [(exported / name).read_bytes() for name in texts] == before
    (exported / 'notes.txt').write_text('mine')
    message = refused(capsys, 'export', finetuned, '--output', exported, '--force')
    assert 'the first of them: name another --output.\n' in message  # no advice to add --force


def test_models_without_the_form_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_for_hf(create_model('eca_test_resnet', kernel_sizes=7), tmp_path / 'source', safe_serialization=True)
    message = refused(capsys, 'export', tmp_path / 'source', '--output', tmp_path / 'output')
    assert 'layer1.0.bn2 has an ECA kernel of 7 where timm\'s test_resnet makes 3' in message
    assert [path.name for path in tmp_path.iterdir() if path.name != 'home'] == ['source']


@pytest.mark.parametrize('damage', ['even', 'missing', 'no config', 'no folder'])
def test_bad_folders(damage: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exported = Path(shutil.copytree(exported, tmp_path / 'copy'))
    tensors = load_file(exported / 'model.safetensors')
    key = 'layer2.0.se.conv.weight'
    if damage == 'even':
        save_file({**tensors, key: torch.zeros(1, 1, 4)}, exported / 'model.safetensors')
    elif damage == 'missing':
        del tensors[key]
        save_file(tensors, exported / 'model.safetensors')
    elif damage == 'no config':
        (exported / 'config.json').unlink()
    else:
        exported = tmp_path / 'nowhere'
    message = refused(capsys, 'export', exported, '--output', tmp_path / 'output')
    assert str(exported) in message
    assert message.endswith(': name a folder that convert or finetune made.\n')
    assert not (tmp_path / 'output').exists()
    if damage in ('even', 'missing'):
        assert key in message
        assert key in refused(capsys, 'push', exported, 'me/name', '--dry-run')


def test_folders_of_timm_alone_need_no_export(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert 'test_resnet has no ECA' in refused(capsys, 'export', exported, '--output', tmp_path / 'output')
