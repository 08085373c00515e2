"""Folders from others: what their config may say, and what their weights must be."""
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import create_model, list_models, save_for_hf
from torch.nn.modules import module as torch_module

from timm_eca.analysis.predict import load_model
from timm_eca.commands.main import main
from timm_eca.errors import ModelError
from timm_eca.weights.model_folder import FolderError, check_folder
from timm_eca.weights.names import base_name, twin_name
from timm_eca.weights.store import WeightsNotFoundError

MODEL = 'eca_test_resnet'


@pytest.fixture
def at_home(folder: Path, home: Path) -> Path:
    """The folder, in the weights directory."""
    home.mkdir()
    return folder.rename(home / f'{MODEL}.mine')


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _arguments(**arguments: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config['model_args'].update(arguments)


def _preprocessing(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config['pretrained_cfg'].update(values)


NOT_BUILT = 'timm cannot build eca_test_resnet'
OTHER_TENSORS = 'does not have the tensors'
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    'wide': (_arguments(channels=[4000] * 4), OTHER_TENSORS),
    'wider': (_arguments(channels=[10 ** 9] * 4), NOT_BUILT),
    'large kernels': (_arguments(kernel_sizes=4001), OTHER_TENSORS),
    'unknown argument': (_arguments(depth=3), NOT_BUILT),
    'many classes': (_arguments(num_classes=10 ** 6), 'has 1000000 classes, its weights 3'),
    'many classes in both places': (
        lambda config: config.update(num_classes=10 ** 6, model_args={'num_classes': 10 ** 6}), OTHER_TENSORS),
    'another file': (_arguments(checkpoint_path='/etc/passwd'), 'model_args may not set checkpoint_path'),
    'another source': (
        _arguments(pretrained_cfg_overlay={'url': 'http://x/'}), 'model_args may not set pretrained_cfg_overlay'),
    'another device': (_arguments(device='cuda'), 'model_args may not set device'),
    'another architecture': (lambda config: config.update(architecture='eca_resnet50'), OTHER_TENSORS),
    'control characters': (lambda config: config.update(architecture='\x1b[31m'), r'timm has no model .*x1b\[31m'),
    'features': (_arguments(features_only=True), 'model_args may not set features_only'),
    'tensors': (_preprocessing(state_dict={'fc.weight': [1]}), 'pretrained_cfg may not set state_dict'),
    'file': (_preprocessing(file='/etc/passwd'), 'pretrained_cfg may not set file'),
    'names that are a number': (lambda config: config.update(label_names=5), 'label_names must be a list'),
    'no sides': (_preprocessing(input_size=[3]), NOT_BUILT),
    'channels that are a text': (_arguments(in_chans='\x1b[31m'), NOT_BUILT),
    'unknown field': (_preprocessing(run='rm'), NOT_BUILT),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_config(name: str, folder: Path):
    change, sentence = BAD[name]
    _change(folder, change)
    with pytest.raises(FolderError, match=sentence) as error:
        check_folder(folder)
    assert str(error.value).isprintable()


def _expect_refusal(folder: Path, sentence: str) -> None:
    """Each way of loading and publishing ends with the same sentence."""
    with pytest.raises(ModelError, match=sentence):
        load_model(str(folder))
    with pytest.raises(WeightsNotFoundError, match=sentence):
        create_model(f'{MODEL}.mine', pretrained=True)
    assert main(['push', str(folder), 'a/b', '--dry-run']) == 2
    assert main(['verify', str(folder)]) == 1


def test_every_way_to_load_checks(at_home: Path):
    _change(at_home, _arguments(checkpoint_path='/etc/passwd'))
    _expect_refusal(at_home, 'model_args may not set checkpoint_path')


def test_what_is_no_file(at_home: Path):
    config, card = at_home / 'config.json', at_home / 'README.md'
    config.rename(at_home / 'config')
    os.mkfifo(config)
    _expect_refusal(at_home, 'no such file')
    config.unlink()
    config.symlink_to('/dev/zero')
    _expect_refusal(at_home, 'no such file')
    config.unlink()
    (at_home / 'config').rename(config)
    card.unlink()
    card.symlink_to('/etc/passwd')
    assert main(['push', str(at_home), 'a/b', '--dry-run']) == 2


def test_endless_nesting(folder: Path):
    (folder / 'config.json').write_text('[' * 100000 + ']' * 100000)
    with pytest.raises(FolderError, match='RecursionError'):
        check_folder(folder)


@pytest.mark.parametrize(('name', 'kwargs', 'safe'), [
    (MODEL, {'num_classes': 7, 'in_chans': 1, 'drop_rate': 0.2, 'attn_layer': 'se'}, True),
    ('test_vit', {'img_size': 192, 'reg_tokens': 5}, False),
])
def test_what_timm_saves_passes(name: str, kwargs: dict[str, Any], safe: bool, tmp_path: Path):
    model = create_model(name, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    assert check_folder(tmp_path)['architecture'] == name
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(value.equal(loaded[key]) for key, value in model.state_dict().items())
    assert main(['verify', str(tmp_path)]) == 0


def test_weights_without_counts_of_batches(folder: Path):
    weights = load_file(folder / 'model.safetensors')
    save_file({k: v for k, v in weights.items() if 'num_batches' not in k}, folder / 'model.safetensors')
    assert load_model(str(folder)).num_classes == 3


def test_pickles(folder: Path):
    """They are read as timm reads them, and run no code."""
    state_dict = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    for new in (False, True):
        torch.save({'epoch': 3, 'state_dict': state_dict}, folder / 'pytorch_model.bin',
                   _use_new_zipfile_serialization=new)
        loaded = load_model(str(folder)).state_dict()
        assert all(value.equal(loaded[key]) for key, value in state_dict.items())
    torch.save({'fc.weight': threading.Thread}, folder / 'pytorch_model.bin')
    with pytest.raises(FolderError, match='can be read safely'):
        check_folder(folder)


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv2_100'])
def test_a_plain_folder_is_a_warm_start(name: str, home: Path):
    """In the place of weights with ECA."""
    plain, twin = create_model(name, num_classes=3).eval(), twin_name(name)
    save_for_hf(plain, home / f'{twin}.mine', safe_serialization=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(create_model(f'{twin}.mine', pretrained=True).eval()(x), plain(x))


def test_names_with_and_without_eca():
    plain = list_models(module=['resnet', 'efficientnet'])
    assert [base_name(twin_name(name)) for name in plain] == plain


def test_the_process_stays_as_it_is(at_home: Path):
    """No signal handler, no alarm, no hook on modules."""
    before = signal.getsignal(signal.SIGALRM)
    signal.alarm(1000)
    try:
        create_model(f'{MODEL}.mine', pretrained=True)
        assert signal.alarm(0) > 900
    finally:
        signal.alarm(0)
    assert signal.getsignal(signal.SIGALRM) == before
    assert not torch_module._global_module_registration_hooks
