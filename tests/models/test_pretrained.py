"""Where `pretrained=True` finds weights, and what goes before what."""
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from helpers.official_files import official_state_dict, save_official
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import read_checkpoint
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.official import OFFICIAL
from timm_eca.weights.store import WeightsNotFoundError, weights_dir


def _has_weights_of(model: torch.nn.Module, file: Path) -> bool:
    source = to_timm(read_checkpoint(file).state_dict)
    return all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_weights_directory(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert weights_dir() == home
    monkeypatch.setenv('TIMM_ECA_HOME', '~/weights')
    assert weights_dir() == Path.home() / 'weights'
    monkeypatch.delenv('TIMM_ECA_HOME')
    from huggingface_hub.constants import HF_HOME
    assert weights_dir() == Path(HF_HOME) / 'timm_eca'


@pytest.mark.parametrize('model', [
    'eca_resnet18', 'eca_resnet34', 'eca_resnet50', 'eca_resnet101', 'eca_resnet152', 'eca_mobilenetv2',
])
def test_one_error_where_there_are_no_weights(model: str, home: Path):
    """Never random weights: what was looked for, and what to do, a line each, the likeliest first."""
    with pytest.raises(WeightsNotFoundError) as error:
        timm.create_model(model, pretrained=True)
    message = str(error.value)
    assert str(home / f'{model}.bangguwu_in1k') in message
    assert f'timm-eca/{model}.bangguwu_in1k' in message
    unset, warm_start, convert_it = message.partition('What you can do:\n')[2].splitlines()
    assert 'HF_HUB_OFFLINE' in unset
    assert 'connection' not in message
    assert warm_start.rpartition(' ')[2] in timm.list_pretrained(f'{model}.*')
    assert f'https://drive.google.com/file/d/{OFFICIAL[model].drive_id}/view' in convert_it
    assert f'timm-eca convert {OFFICIAL[model].file}' in convert_it
    assert 'create_model' not in message  # commands show it, too
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


@pytest.mark.parametrize(('name', 'repo_id'), [
    ('eca_resnext50_32x4d', 'timm/resnext50_32x4d.a1h_in1k'),
    ('eca_resnet50.a1_in1k', 'timm/resnet50.a1_in1k'),
    ('eca_regnety_002', 'timm/regnety_002.pycls_in1k'),
])
def test_one_error_where_a_warm_start_is_not_to_be_had(name: str, repo_id: str):
    with pytest.raises(WeightsNotFoundError, match=f'Hub, {repo_id}: '):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name', ['eca_resnet18', 'eca_resnet18.bangguwu_in1k'])
@pytest.mark.parametrize('pretrained', [True, False])
def test_converted_once_is_found(name: str, pretrained: bool, resnet18_file: Path):
    convert(resnet18_file)
    model = timm.create_model(name, pretrained=pretrained)
    assert _has_weights_of(model, resnet18_file) == pretrained


def test_registered_config_as_scripts_resolve_it(resnet18_file: Path):
    """timm's train.py and validate.py hand over the registry's config as a dict: it is the same weights."""
    convert(resnet18_file)
    args = timm.models.resolve_model_input_args('eca_resnet18')
    assert _has_weights_of(timm.create_model(args.pop('model_name'), pretrained=True, **args), resnet18_file)


def test_callers_arguments_go_before_the_folders(tmp_path: Path):
    """The folder's config has defaults: kernel sizes, classes, channels, preprocessing."""
    file = save_official(
        tmp_path / 'mine.pth.tar',
        official_state_dict('eca_resnet18', kernel_sizes=(3, 3, 3, 3), num_classes=10, in_chans=1))
    convert(file, tag='mine', mean=[0.3], std=[0.2])
    model = timm.create_model('eca_resnet18.mine', pretrained=True)
    assert model.num_classes == 10
    assert model.conv1.in_channels == 1
    assert model.layer4[0].bn2.attn.conv.kernel_size == (3,)
    assert list(model.pretrained_cfg['mean']) == [0.3]
    assert model.pretrained_cfg['tag'] == 'mine'
    assert _has_weights_of(model, file)

    model = timm.create_model(
        'eca_resnet18.mine', pretrained=True, num_classes=4, in_chans=3, drop_rate=0.5,
        pretrained_cfg_overlay={'crop_pct': 1.0})
    assert (model.num_classes, model.conv1.in_channels, model.drop_rate) == (4, 3, 0.5)
    assert model.pretrained_cfg['crop_pct'] == 1.0
    with pytest.raises(ValueError, match=r'kernel_sizes=\[3, 3, 3, 3\]'):
        timm.create_model('eca_resnet18.mine', pretrained=True, kernel_sizes=5)

    untrained = timm.create_model('eca_resnet18.mine', pretrained=False)  # the config holds, the weights don't
    assert untrained.num_classes == 10
    assert not _has_weights_of(untrained, file)


def test_unknown_tag(home: Path):
    with pytest.raises(WeightsNotFoundError, match=r'there are eca_resnet18\.bangguwu_in1k, .* and no folder'):
        timm.create_model('eca_resnet18.mine', pretrained=True)


def test_sources_that_win(resnet18_file: Path, tmp_path: Path, home: Path):
    """An overlay that names a source, and `local-dir:`, go before the weights directory."""
    other = save_official(tmp_path / 'other.pth.tar', {
        key: value + 1 for key, value in official_state_dict('eca_resnet18').items()})
    convert(resnet18_file)
    folder = convert(other, tmp_path / 'other').folder
    state_dict = to_timm(read_checkpoint(other).state_dict)
    for overlay in ({'file': str(other)}, {'state_dict': state_dict}, {'source': 'local-dir', 'file': str(folder)}):
        model = timm.create_model('eca_resnet18', pretrained=True, pretrained_cfg_overlay=overlay)
        assert _has_weights_of(model, other), overlay
    assert _has_weights_of(timm.create_model(f'local-dir:{folder}', pretrained=True), other)
    with pytest.raises(LocalEntryNotFoundError):  # looked for there, and the client's own error left as it is
        timm.create_model('eca_resnet18', pretrained=True, pretrained_cfg_overlay={'hf_hub_id': 'else/where'})


def test_overlay_without_a_source_is_merged(resnet18_file: Path):
    convert(resnet18_file)
    model = timm.create_model('eca_resnet18', pretrained=True, pretrained_cfg_overlay={'mean': (0.5, 0.5, 0.5)})
    assert _has_weights_of(model, resnet18_file)
    assert tuple(model.pretrained_cfg['mean']) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize('damage', [
    'no weights', 'cut off weights', 'no config', 'broken config', 'config of a list', 'other model',
])
def test_damaged_folder(damage: str, resnet18_file: Path):
    folder = convert(resnet18_file).folder
    config = folder / 'config.json'
    if damage == 'no weights':
        (folder / 'model.safetensors').unlink()
    elif damage == 'cut off weights':
        weights = folder / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == 'no config':
        config.unlink()
    elif damage == 'broken config':
        config.write_text(config.read_text()[:100])
    elif damage == 'config of a list':
        config.write_text('[1, 2]')
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {'architecture': 'resnet18'}))
    with pytest.raises(WeightsNotFoundError, match=r'timm-eca convert --force'):
        timm.create_model('eca_resnet18', pretrained=True)


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), SafetensorError('Dtype not understood')])
def test_tensors_that_cannot_be_read(error: Exception, resnet18_file: Path, monkeypatch: pytest.MonkeyPatch):
    """The check of the folder reads the header of the file only."""
    convert(resnet18_file)
    monkeypatch.setattr('safetensors.torch.load_file', Mock(side_effect=error))
    with pytest.raises(WeightsNotFoundError, match=r'timm-eca convert --force'):
        timm.create_model('eca_resnet18', pretrained=True)


def test_weights_with_tensors_that_no_model_needs(tmp_path: Path):
    """timm's weights of DLA have some."""
    torch.manual_seed(0)
    plain = timm.create_model('dla46_c').state_dict()
    torch.save(plain | {'level3.project.0.weight': torch.ones(1)}, tmp_path / 'plain.pth')
    overlay = {'file': str(tmp_path / 'plain.pth')}
    model = timm.create_model('eca_dla46_c', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.state_dict()['level5.tree1.conv1.weight'], plain['level5.tree1.conv1.weight'])

    del plain['level5.tree1.conv1.weight']
    torch.save(plain, tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match='lacks 1 tensors'):
        timm.create_model('eca_dla46_c', pretrained=True, pretrained_cfg_overlay=overlay)
    timm.create_model('eca_resnet18', pretrained=True, pretrained_strict=False, pretrained_cfg_overlay={
        'state_dict': {'conv1.weight': torch.ones(64, 3, 7, 7)}})


@pytest.mark.parametrize('change', ['no gate', 'no tensor', 'plain without a tensor'])
def test_nothing_is_left_random_in_silence(change: str, tmp_path: Path):
    """With another number of classes timm loads what there is: the filter refuses what is not whole."""
    state_dict = to_timm(official_state_dict('eca_resnet18'))
    gone = {
        'no gate': ('layer2.1.bn2.attn',), 'no tensor': ('layer2.1.bn1.bias',),
        'plain without a tensor': ('.attn.', 'layer2.1.bn1.bias'),
    }[change]
    state_dict = {key: value for key, value in state_dict.items() if not any(part in key for part in gone)}
    if change.startswith('plain'):
        state_dict = {key.replace('.norm.', '.'): value for key, value in state_dict.items()}
    with pytest.raises(ValueError, match='lacks 1 tensors'):
        timm.create_model(
            'eca_resnet18', pretrained=True, num_classes=10, pretrained_cfg_overlay={'state_dict': state_dict})


def test_head_is_new_and_the_rest_loaded(resnet18_file: Path, mobilenetv2_file: Path):
    """Another number of classes, another number of channels, and feature extractors, from the weights directory."""
    for name, file in (('eca_resnet18', resnet18_file), ('eca_mobilenetv2', mobilenetv2_file)):
        folder = convert(file).folder
        source = to_timm(read_checkpoint(file).state_dict)
        model = timm.create_model(name, pretrained=True, num_classes=5)
        loaded = {key: torch.equal(value, source[key]) for key, value in model.state_dict().items()
                  if value.shape == source[key].shape}
        assert all(loaded.values())
        assert len(loaded) == len(source) - 2
        stem = model.pretrained_cfg['first_conv']
        gray = timm.create_model(name, pretrained=True, in_chans=1).get_submodule(stem).weight
        torch.testing.assert_close(gray, source[f'{stem}.weight'].sum(1, keepdim=True))
        features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 3))
        for key, value in features.state_dict().items():
            assert torch.equal(value, source[key]), key
        shutil.rmtree(folder)


def test_torchvisions_names_of_regnet():
    """timm's filter of this family has a name and arguments of its own."""
    from torchvision.models import regnet_y_400mf

    plain = regnet_y_400mf().eval()
    overlay = {'state_dict': plain.state_dict()}
    model = timm.create_model('eca_regnety_004', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize('num_classes', [1000, 10])
def test_names_of_before_are_refused(num_classes: int):
    """Where a block had ECA beside its norm. Those of ResNets are the authors' names, and load, as MobileNetV2's."""
    def before(model: str) -> dict[str, torch.Tensor]:
        state_dict = timm.create_model(model).state_dict()
        return {re.sub(r'\.bn\d\.attn\.', '.eca.', key.replace('.norm.', '.')): v for key, v in state_dict.items()}

    def create(model: str, state_dict: dict[str, torch.Tensor]) -> torch.nn.Module:
        return timm.create_model(
            model, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay={'state_dict': dict(state_dict)})

    for key in ('layer1.0.bn2.attn.conv.weight', 'layer1.0.eca.conv.weight'):  # names of a ResNet, in a SKNet
        plain = timm.create_model('skresnet18').state_dict()
        with pytest.raises(ValueError, match=r'the attention layer1\.0\.bn2\.attn'):
            create('eca_skresnet18', {**plain, key: torch.ones(1, 1, 3)})
    with pytest.raises(ValueError, match='timm_eca made it before'):
        create('eca_regnety_002', {
            key.replace('.conv3.bn.attn.', '.eca.').replace('.norm.', '.'): value
            for key, value in timm.create_model('eca_regnety_002').state_dict().items()})
    for name, old, norm in (
            ('eca_resnet18', 'layer4.1', 'layer4.1.bn2'), ('eca_mobilenetv2_050', 'blocks.0.0', 'blocks.0.0.bn2')):
        state_dict = before(name)
        loaded = create(name, state_dict).state_dict()
        assert torch.equal(loaded[f'{norm}.attn.conv.weight'], state_dict[f'{old}.eca.conv.weight'])
