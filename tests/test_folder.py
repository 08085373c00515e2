"""Folders of strangers: what their config may say, and what is built of it."""
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import create_model, save_for_hf

from timm_eca.cli import main
from timm_eca.folder import FolderError, check_folder
from timm_eca.predict import load_model
from timm_eca.pretrained import WeightsNotFoundError

MODEL = 'eca_test_resnet'


@pytest.fixture
def folder(home: Path) -> Path:
    """A folder in the weights directory."""
    folder = home / f'{MODEL}.mine'
    save_for_hf(create_model(MODEL, num_classes=3, kernel_sizes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_text('A card.')
    return folder


def _arguments(**arguments: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config['model_args'].update(arguments)


def _preprocessing(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config['pretrained_cfg'].update(values)


HUGE = 'describes no eca_test_resnet \\(RuntimeError: it has more than'
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    'many blocks': (_arguments(layers=[4000] * 4), HUGE),
    'wide': (_arguments(channels=[4000] * 4), 'has not the tensors'),
    'wider': (_arguments(channels=[10 ** 9] * 4), 'channels among its model_args'),
    'large kernels': (_arguments(kernel_sizes=4001), 'has not the tensors'),
    'many classes': (_arguments(num_classes=10 ** 6), r'fc\.(bias|weight) the first'),
    'more classes': (lambda config: config.update(num_classes=10 ** 12), 'value of num_classes'),
    'no classes': (lambda config: config.update(num_classes=None), 'value of num_classes'),
    'another file': (_arguments(checkpoint_path='/etc/passwd'), 'checkpoint_path among'),
    'another source': (_arguments(pretrained_cfg_overlay={'url': 'http://x/'}), 'pretrained_cfg_overlay among'),
    'another device': (_arguments(device='cuda'), 'device among'),
    'another architecture': (lambda config: config.update(architecture='eca_resnet50'), 'has not the tensors'),
    'control characters': (lambda config: config.update(architecture='\x1b[31m'), r'x1b\[31m., which timm'),
    'own loading': (_preprocessing(custom_load=True), 'value of custom_load'),
    'tensors': (_preprocessing(state_dict={'fc.weight': [1]}), 'value of state_dict'),
    'huge images': (_preprocessing(input_size=[3, 10 ** 6, 10 ** 6]), 'value of input_size'),
    'images cut from huge ones': (_preprocessing(crop_pct=1e-9), 'value of crop_pct'),
    'means of other channels': (_preprocessing(mean=[0.5, 0.5]), 'one mean for each'),
    'no deviation': (_preprocessing(std=[0, 1, 1]), 'value of std'),
    'endless number': (_preprocessing(crop_pct=10 ** 400), 'value of crop_pct'),
    'channels that are a text': (_arguments(in_chans='\x1b[31m'), 'in_chans among'),
    'NaN': (_preprocessing(crop_pct=float('nan')), 'NaN is no number'),
    'unknown field': (_preprocessing(run='rm'), 'describes no'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_config(name: str, folder: Path):
    """Each way of loading and publishing ends with the one sentence."""
    change, sentence = BAD[name]
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    _expect_refusal(folder, sentence)


def _expect_refusal(folder: Path, sentence: str) -> None:
    with pytest.raises(FolderError, match=sentence):
        check_folder(folder)
    with pytest.raises(ValueError, match=sentence):
        load_model(str(folder))
    with pytest.raises(WeightsNotFoundError, match=sentence):
        create_model(f'{MODEL}.mine', pretrained=True)
    assert main(['push', str(folder), 'a/b', '--dry-run']) == 2
    assert main(['verify', str(folder)]) == 1


def test_endless_nesting(folder: Path):
    (folder / 'config.json').write_text('[' * 100000 + ']' * 100000)
    _expect_refusal(folder, 'RecursionError')


def test_tensors_of_foreign_types(folder: Path):
    weights = load_file(folder / 'model.safetensors')
    save_file(weights | {'fc.bias': torch.zeros(3, dtype=torch.complex64)}, folder / 'model.safetensors')
    _expect_refusal(folder, 'of type C64')


@pytest.mark.parametrize('safe', [True, False])
@pytest.mark.parametrize(('name', 'kwargs'), [
    ('eca_resnet18', {'num_classes': 7, 'in_chans': 1, 'drop_rate': 0.2}),
    ('eca_mobilenetv2_050', {'attn': 'se'}),
    ('resnet18', {'act_layer': 'silu'}),
    ('vit_tiny_patch16_224', {'img_size': 160}),
])
def test_what_timm_saves_passes(name: str, kwargs: dict[str, Any], safe: bool, tmp_path: Path):
    model = create_model(name, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    assert check_folder(tmp_path).architecture == name
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(value.equal(loaded[key]) for key, value in model.state_dict().items())


def test_pickles_run_no_code(tmp_path: Path):
    save_for_hf(create_model(MODEL), tmp_path)
    torch.save({'fc.weight': threading.Thread}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(FolderError, match='can read safely'):
        check_folder(tmp_path)


def test_the_limit_of_modules_is_this_threads(folder: Path):
    """Models that others build meanwhile don't count."""
    errors: list[Exception] = []

    def build() -> None:
        try:
            for _ in range(20):
                create_model('resnet50', device='meta')
        except Exception as e:
            errors.append(e)

    other = threading.Thread(target=build)
    other.start()
    for _ in range(10):
        check_folder(folder)
    other.join()
    assert not errors
