"""Where `pretrained=True` finds weights, and which settings win."""
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import ResNet, create_model, get_pretrained_cfg, save_for_hf

from timm_eca.conversion.pretrained import find_pretrained
from timm_eca.weights.official import OFFICIAL
from timm_eca.weights.store import WeightsNotFoundError, find_local_weights, weights_dir

MODEL = 'eca_test_resnet'
NAME = 'eca_resnet18.bangguwu_in1k'
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(home: Path) -> Path:
    """A folder in the weights directory."""
    torch.manual_seed(0)
    model = create_model(MODEL, num_classes=10, in_chans=1, kernel_sizes=3)
    model.pretrained_cfg.update(mean=(0.3,), std=(0.2,), input_size=(1, 160, 160), tag='mine')
    save_for_hf(model, home / f'{MODEL}.mine', safe_serialization=True)
    return home / f'{MODEL}.mine'


def _tensors(folder: Path) -> Tensors:
    return create_model(f'local-dir:{folder}', pretrained=True).state_dict()


def _has(model: torch.nn.Module, tensors: Tensors) -> bool:
    return all(value.equal(tensors[key]) for key, value in model.state_dict().items())


def test_weights_directory(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert weights_dir() == home
    monkeypatch.setenv('TIMM_ECA_HOME', '~/weights')
    assert weights_dir() == Path.home() / 'weights'
    monkeypatch.delenv('TIMM_ECA_HOME')
    assert weights_dir() == Path(HF_HOME) / 'timm_eca'


def test_no_weights_of_the_authors(home: Path):
    """Never random weights, but one error: a line for each source, then a line for each fix."""
    for model, official in OFFICIAL.items():
        with pytest.raises(WeightsNotFoundError) as error:
            create_model(model, pretrained=True)
        directory, hub = error.value.sources
        assert str(home / f'{model}.bangguwu_in1k') in directory
        assert hub == f'Hub, timm-eca/{model}.bangguwu_in1k: not in the cache, and HF_HUB_OFFLINE is set'
        unset, warm_start, browser, *rest = error.value.fixes
        assert unset == 'unset HF_HUB_OFFLINE'
        assert warm_start.rpartition(' ')[2] in timm.list_pretrained(f'{model}.*')
        assert official.url in browser
        assert f'timm-eca convert {official.file}' in browser
        assert [('--initial' in fix, '--no-pretrained' in fix) for fix in rest] == [(True, False), (False, True)]
        lines = [*error.value.sources, *error.value.fixes]
        assert [line for line in lines if line not in str(error.value)] == []


@pytest.mark.parametrize(('name', 'repo_id'), [
    ('eca_resnet50.a1_in1k', 'timm/resnet50.a1_in1k'),
    ('eca_regnety_002', 'timm/regnety_002.pycls_in1k'),
])
def test_no_warm_start(name: str, repo_id: str):
    """The fixes name what works without a network, in commands and in Python."""
    with pytest.raises(WeightsNotFoundError, match=f'Hub, {repo_id}: not in the cache') as error:
        create_model(name, pretrained=True)
    fixes = '\n'.join(error.value.fixes)
    for fix in ('unset HF_', '--initial-checkpoint FILE', 'dict(file=FILE)', '--no-pretrained', 'pretrained=False'):
        assert fix in fixes


def test_weights_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(WeightsNotFoundError, match=r'https://.*/seresnext26_32x4d-.*: URLError') as error:
        create_model('eca_legacy_seresnext26_32x4d', pretrained=True)
    assert 'connection' in error.value.fixes[0]
    assert find_pretrained('legacy_seresnet50') is None
    with pytest.raises(WeightsNotFoundError, match='timm has no weights'):
        create_model('eca_cspresnet50d', pretrained=True)


def test_one_entry_and_one_model(home: Path):
    save_for_hf(create_model('eca_resnet18'), home / NAME, safe_serialization=True)
    entry, network = timm.models.model_entrypoint('eca_resnet18').__code__, ResNet.__init__.__code__
    calls: Counter[Any] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[frame.f_code] += event == 'call' and frame.f_code in (entry, network)

    sys.setprofile(count)
    try:
        model = create_model('eca_resnet18', pretrained=True)
    finally:
        sys.setprofile(None)
    assert (calls[entry], calls[network]) == (1, 1)
    tensors = _tensors(home / NAME)
    assert _has(model, tensors)

    # The same weights by other names. timm's train.py and validate.py pass the registered config as a dict.
    for kwargs in (
            {'pretrained_cfg_overlay': {'mean': (0.5, 0.5, 0.5)}}, {'pretrained_cfg': 'bangguwu_in1k'},
            {'pretrained_cfg': get_pretrained_cfg(NAME)}, {'pretrained_cfg': get_pretrained_cfg(NAME).to_dict()}):
        model = create_model('eca_resnet18', pretrained=True, **kwargs)
        assert _has(model, tensors), kwargs
        assert model.pretrained_cfg['mean'][0] == (0.5 if 'pretrained_cfg_overlay' in kwargs else 0.485)
    assert not _has(create_model(NAME), tensors)


def test_arguments_of_the_caller_win(folder: Path, tmp_path: Path):
    """Over those in the folder's config: kernel sizes, classes, channels, preprocessing."""
    tensors = _tensors(folder)
    model = create_model(f'{MODEL}.mine', pretrained=True)
    assert (model.num_classes, model.conv1[0].in_channels) == (10, 1)
    assert model.layer4[0].bn2.attn.conv.kernel_size == (3,)
    assert (*model.pretrained_cfg['mean'], model.pretrained_cfg['tag']) == (0.3, 'mine')
    assert _has(model, tensors)
    save_for_hf(model, tmp_path / 'again', safe_serialization=True)  # the arguments are kept
    assert _has(create_model(f'local-dir:{tmp_path / "again"}', pretrained=True), tensors)

    model = create_model(
        f'{MODEL}.mine', pretrained=True, num_classes=4, in_chans=3, drop_rate=0.5,
        pretrained_cfg_overlay={'crop_pct': 1.0})
    assert (model.num_classes, model.conv1[0].in_channels, model.drop_rate) == (4, 3, 0.5)
    assert model.pretrained_cfg['crop_pct'] == 1.0
    with pytest.raises(ValueError, match='kernels of sizes'):
        create_model(f'{MODEL}.mine', pretrained=True, kernel_sizes=5)

    assert create_model(f'{MODEL}.mine').num_classes == 10


@pytest.mark.parametrize('pretrained', [True, False])
def test_unknown_tag(pretrained: bool, home: Path):
    with pytest.raises(WeightsNotFoundError, match=r'no weights eca_resnet18\.mine') as error:
        create_model('eca_resnet18.mine', pretrained=pretrained)
    assert NAME in error.value.fixes[0]
    assert str(home / 'eca_resnet18.mine') in error.value.fixes[1]


def test_sources_of_the_caller_win(folder: Path, tmp_path: Path):
    """An overlay with a source, and `local-dir:`, go before the weights directory."""
    other = create_model(MODEL)
    save_for_hf(other, tmp_path / 'other', safe_serialization=True)
    tensors = other.state_dict()
    torch.save(tensors, tmp_path / 'other.pth')
    for overlay in (
            {'file': str(tmp_path / 'other.pth')}, {'state_dict': dict(tensors)},
            {'source': 'local-dir', 'file': str(tmp_path / 'other')}):
        assert _has(create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay), tensors), overlay
    assert _has(create_model(f'local-dir:{tmp_path / "other"}', pretrained=True), tensors)
    with pytest.raises(LocalEntryNotFoundError):  # the client's own error for a repository of the caller
        create_model(MODEL, pretrained=True, pretrained_cfg_overlay={'hf_hub_id': 'else/where'})


@pytest.mark.parametrize(('damage', 'sentence'), [
    ('no weights', 'No such file'), ('cut off weights', 'SafetensorError|header|incomplete|deserializ'),
    ('no config', 'not the config of a model'), ('broken config', 'not the config of a model'),
    ('list', 'not the config of a model'), ('other model', 'it holds weights of resnet18'),
    ('reserved', 'may not set checkpoint_path'), ('unknown entry', "'run'"), ('classes', 'two numbers of classes'),
    ('other tensors', 'do not fit this model'),
])
def test_damaged_folder(damage: str, sentence: str, folder: Path):
    """The load itself reports it, in one sentence."""
    config, weights = folder / 'config.json', folder / 'model.safetensors'
    content = json.loads(config.read_text())
    if damage == 'no weights':
        weights.unlink()
    elif damage == 'cut off weights':
        weights.write_bytes(weights.read_bytes()[:50000])
    elif damage == 'no config':
        config.unlink()
    elif damage == 'broken config':
        config.write_text(config.read_text()[:100])
    else:
        content['model_args'].update({
            'reserved': {'checkpoint_path': '/etc/passwd'}, 'classes': {'num_classes': 5},
            'other tensors': {'num_classes': 5}}.get(damage, {}))
        content['num_classes'] = 5 if damage == 'other tensors' else 10
        content['pretrained_cfg'].update({'run': 'rm'} if damage == 'unknown entry' else {})
        content['architecture'] = 'resnet18' if damage == 'other model' else MODEL
        config.write_text('[1]' if damage == 'list' else json.dumps(content))
    with pytest.raises(WeightsNotFoundError, match=sentence) as error:
        create_model(f'{MODEL}.mine', pretrained=True)
    assert 'timm-eca convert --force' in error.value.fixes[-1]
    assert str(folder) in error.value.problem
    assert isinstance(error.value.__cause__, Exception)


def test_an_error_of_the_disk(folder: Path):
    with mock.patch('safetensors.torch.load_file', side_effect=OSError(5, 'Input/output error')), \
            pytest.raises(WeightsNotFoundError, match=r'Input/output error.*timm-eca convert --force'):
        create_model(f'{MODEL}.mine', pretrained=True)


def test_folders_are_found_without_a_model(folder: Path):
    """For `list`, which asks for each tag."""
    with mock.patch.object(ResNet, '__init__', side_effect=AssertionError):
        assert find_local_weights(f'{MODEL}.mine') == folder
        assert find_local_weights(f'{MODEL}.other') is None


def test_weights_with_tensors_that_no_model_needs():
    """timm's weights of DLA have some."""
    torch.manual_seed(0)
    plain = create_model('dla46_c').state_dict()
    state_dict = plain | {'level3.project.0.weight': torch.ones(1)}
    model = create_model('eca_dla46_c', pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
    assert model.state_dict()['level5.tree1.conv1.weight'].equal(plain['level5.tree1.conv1.weight'])
    del plain['level5.tree1.conv1.weight']
    with pytest.raises(ValueError, match='lacks 1 tensors'):
        create_model('eca_dla46_c', pretrained=True, pretrained_cfg_overlay={'state_dict': plain})
    state_dict = {'conv1.0.weight': torch.ones(create_model(MODEL).conv1[0].weight.shape)}
    create_model(MODEL, pretrained=True, pretrained_strict=False, pretrained_cfg_overlay={'state_dict': state_dict})


def test_nothing_stays_random():
    """With another number of classes timm loads what is there, so the filter refuses what is incomplete."""
    whole = create_model(MODEL).state_dict()
    plain = {key.replace('.norm.', '.'): value for key, value in whole.items() if '.attn.' not in key}
    for state_dict, gone in ((whole, 'layer2.0.bn2.attn.conv.weight'), (whole, 'layer2.0.bn1.bias'),
                             (plain, 'layer2.0.bn1.bias')):
        state_dict = {key: value for key, value in state_dict.items() if key != gone}
        with pytest.raises(ValueError, match='lacks 1 tensors'):
            create_model(MODEL, pretrained=True, num_classes=10, pretrained_cfg_overlay={'state_dict': state_dict})


@pytest.mark.parametrize('name', [MODEL, 'eca_test_efficientnet'])
def test_other_heads_and_stems(name: str, home: Path):
    """Another number of classes or channels, and feature extractors, from the weights directory."""
    save_for_hf(create_model(name), home / f'{name}.mine', safe_serialization=True)
    source = _tensors(home / f'{name}.mine')
    model = create_model(f'{name}.mine', pretrained=True, num_classes=5)
    head = model.pretrained_cfg['classifier']
    loaded = {key: value.equal(source[key]) for key, value in model.state_dict().items() if not key.startswith(head)}
    assert all(loaded.values())
    assert len(loaded) == len(source) - 2
    stem = model.pretrained_cfg['first_conv']
    gray = create_model(f'{name}.mine', pretrained=True, in_chans=1).get_submodule(stem).weight
    torch.testing.assert_close(gray, source[f'{stem}.weight'].sum(1, keepdim=True))
    features = create_model(f'{name}.mine', pretrained=True, features_only=True, out_indices=(1, 3))
    assert len(features.state_dict()) > 20
    assert _has(features, source)


def test_torchvisions_names_of_regnet():
    """timm's filter for this family has a name and arguments of its own."""
    from torchvision.models import regnet_y_400mf

    plain = regnet_y_400mf().eval()
    overlay = {'state_dict': plain.state_dict()}
    model = create_model('eca_regnety_004', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))


def test_eca_beside_the_norm():
    """The names of the authors, in any family."""
    def create(model: str, state_dict: Tensors) -> torch.nn.Module:
        return create_model(
            model, pretrained=True, num_classes=10, pretrained_cfg_overlay={'state_dict': dict(state_dict)})

    with pytest.raises(ValueError, match=r'the attention layer1\.0\.bn2\.attn'):  # a ResNet's name, in an SKNet
        create('eca_skresnet18', {
            **create_model('skresnet18').state_dict(), 'layer1.0.bn2.attn.conv.weight': torch.ones(1, 1, 3)})
    for name, place in (
            (MODEL, 'layer4.0.bn2'), ('eca_mobilenetv2_050', 'blocks.0.0.bn2'), ('eca_regnety_002', 's1.b1.conv3.bn')):
        state_dict = create_model(name).state_dict()
        beside = {
            re.sub(r'\.(bn\d|conv3\.bn)\.attn\.', '.eca.', key.replace('.norm.', '.')): value
            for key, value in state_dict.items()}
        assert beside.keys() != state_dict.keys()
        key = f'{place}.attn.conv.weight'
        assert torch.equal(create(name, beside).state_dict()[key], state_dict[key])


@pytest.mark.parametrize('attn_layer', ['eca', 'ceca'])
def test_folder_in_the_form_of_timm(attn_layer: str, home: Path):
    """It keeps the arguments of the model. timm's circular ECA is not taken for ECA."""
    stock = create_model(
        'test_resnet', block_args={'attn_layer': attn_layer}, act_layer='silu', global_pool='max', num_classes=7).eval()
    save_for_hf(stock, home / 'eca_test_resnet.stock', safe_serialization=True)
    if attn_layer == 'ceca':
        with pytest.raises(WeightsNotFoundError, match='its attention is ceca'):
            create_model('eca_test_resnet.stock', pretrained=True)
        return
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(create_model('eca_test_resnet.stock', pretrained=True).eval()(x), stock(x))
