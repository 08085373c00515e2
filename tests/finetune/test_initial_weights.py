"""The weights that `timm-eca finetune` starts from."""
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.image_folders import FAST, MODEL, images, touch
from helpers.official_files import official_state_dict, save_official
from safetensors.torch import save_file
from timm.models import create_model, save_for_hf

from timm_eca.commands.main import main
from timm_eca.errors import TimmEcaError

pytest.importorskip('accelerate')
pytest.importorskip('sklearn')

from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.settings import Settings


def start_from(path: Path | str, model: str = MODEL, classes: str = 'abc') -> tuple[torch.nn.Module, str]:
    return create_with_weights(Settings('digits', model=model, initial_checkpoint=str(path)), classes)


def test_weights_to_start_from(tmp_path: Path):
    torch.manual_seed(1)
    base, eca = create_model('mobilenetv2_050', num_classes=5), create_model(MODEL, num_classes=5)
    plain = base.state_dict()
    torch.save(plain, tmp_path / 'plain.pth')
    save_file(plain, tmp_path / 'plain.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in plain.items()}}, tmp_path / 'wrapped.pth')
    torch.save({k: v for k, v in plain.items() if not k.startswith('classifier')}, tmp_path / 'backbone.pth')
    save_for_hf(eca, tmp_path / 'folder', safe_serialization=True)
    save_for_hf(base, tmp_path / 'plain folder', safe_serialization=True)
    norm = 'blocks.1.0.bn3.norm.weight'
    for path in ('plain.pth', 'plain.safetensors', 'wrapped.pth', 'backbone.pth', 'plain folder', 'folder'):
        model, start = start_from(tmp_path / path)
        assert path.partition('.')[0] in start, path
        assert ('warm start' in start) == (path != 'folder')
        weights = model.state_dict()
        # ECA's constant channel weights of a warm start are 0.5.
        source = eca.state_dict() if path == 'folder' else plain
        assert torch.equal(weights[norm], source[norm] if path == 'folder' else 2 * source['blocks.1.0.bn3.weight'])
        assert torch.equal(weights['conv_stem.weight'], source['conv_stem.weight']), path
        assert weights['classifier.weight'].shape == (3, 1280)
    # The plain model takes the same files, for comparisons.
    model, _ = start_from(tmp_path / 'backbone.pth', 'mobilenetv2_050')
    assert torch.equal(model.state_dict()['conv_stem.weight'], plain['conv_stem.weight'])
    official = save_official(tmp_path / 'o.pth.tar', official_state_dict('eca_resnet18'))
    model, _ = start_from(official, 'eca_resnet18')
    expected = official_state_dict('eca_resnet18')['layer1.0.eca.conv.weight']
    assert torch.equal(model.state_dict()['layer1.0.bn2.attn.conv.weight'], expected)


def test_weights_for_the_model_of_a_folder(tmp_path: Path):
    """The folder says which model, the checkpoint has its weights."""
    models = [create_model('eca_test_resnet', num_classes=3, kernel_sizes=5) for _ in 'ab']
    for model, name in zip(models, 'ab'):
        save_for_hf(model, tmp_path / name, model_config={'label_names': ['x', 'y', 'z']})
    torch.save(models[1].state_dict(), tmp_path / 'b.pth')
    for checkpoint in ('b', 'b.pth'):
        model, start = start_from(tmp_path / checkpoint, str(tmp_path / 'a'), 'xyz')
        assert checkpoint in start
        assert all(torch.equal(value, models[1].state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('model', ['eca_test_resnet', 'test_resnet'])
@pytest.mark.parametrize(('name', 'words'), [
    ('missing.pth', 'does not exist'), ('rubbish.pth', 'name a checkpoint'),
    ('rubbish.safetensors', 'name a checkpoint'), ('empty', 'name the file itself'),
    ('resnet.pth', 'name weights of this model'), ('part.pth', 'lacks'), ('views.pth', 'needs more bytes'),
])
def test_bad_weights_to_start_from(tmp_path: Path, model: str, name: str, words: str):
    path, state_dict = tmp_path / name, create_model('test_resnet').state_dict()
    if name.startswith('rubbish'):
        path.write_bytes(b'rubbish')
    elif name == 'empty':
        path.mkdir()
    elif name == 'part.pth':
        torch.save({k: v for k, v in state_dict.items() if not k.startswith('layer3')}, path)
    elif name == 'views.pth':
        torch.save(state_dict | {'layer1.0.conv1.weight': torch.zeros(1).expand(2 ** 40)}, path)
    elif name == 'resnet.pth':
        torch.save(create_model('test_vit').state_dict(), path)
    with pytest.raises(TimmEcaError) as caught:
        start_from(path, model)
    assert words in str(caught.value)
    assert name in caught.value.problem


@pytest.mark.parametrize('model', ['eca_resnet50', 'eca_test_resnet', 'test_vit'])
def test_pretrained_weights_that_cant_be_had(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str):
    """The error names the Hub's address, and only what this command can do."""
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    touch(tmp_path / 'data', *images('a', 'b'))
    assert main(['finetune', str(tmp_path / 'data'), '--model', model, '--output', str(tmp_path / 'out')]) == 2
    fixes = re.findall(r'^  - (.*)$', capsys.readouterr().err, re.MULTILINE)
    assert len(fixes) == 3
    assert 'https://huggingface.co' in fixes[0]
    assert 'HF_ENDPOINT' in fixes[0]
    assert '--initial-checkpoint' in fixes[1]
    assert '--no-pretrained' in fixes[2]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('options', [[], ['--initial-checkpoint', 'absent']])
def test_a_misspelt_model(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    touch(tmp_path, *images('data/a', 'data/b'))
    command = ['finetune', str(tmp_path / 'data'), *FAST, '--output', str(tmp_path / 'out')]
    assert main([*command, *options, '--model', 'eca_resnet_50']) == 2
    assert 'there is no model eca_resnet_50: did you mean eca_resnet50' in capsys.readouterr().err


def test_preprocessing_is_kept(tmp_path: Path):
    touch(tmp_path, *images('fruit/a', 'fruit/b', 'fruit/c'))
    save_for_hf(
        create_model('eca_test_resnet', num_classes=3), tmp_path / 'source', safe_serialization=True,
        model_config={'label_names': ['x', 'y', 'z'], 'pretrained_cfg': {'crop_mode': 'squash'}})
    out = tmp_path / 'out'
    model = ['--model', f'local-dir:{tmp_path / "source"}', *FAST[3:]]
    assert main(['finetune', str(tmp_path / 'fruit'), *model, '--epochs', '1', '--output', str(out)]) == 0
    config = json.loads((out / 'config.json').read_text())
    assert config['pretrained_cfg']['crop_mode'] == 'squash'
    assert config['label_names'] == ['a', 'b', 'c']
    assert not config['pretrained_cfg'].get('label_names')
    card = (out / 'README.md').read_text()
    assert 'From source, on' in card
    assert '--model source ' in card
    assert str(tmp_path) not in card
