"""The forms in which trainers save checkpoints, made by the tools themselves: `convert` and `finetune` read them."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers.networks import randomize_norms
from safetensors.torch import save_model
from timm.models import create_model
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import CheckpointError, read_checkpoint
from timm_eca.conversion.verify import verify
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.settings import Settings
from timm_eca.weights.key_maps import to_official

MODEL = 'eca_mobilenetv2_050'
EMA = 'state_dict_ema'


@pytest.fixture(scope='module')
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(create_model(MODEL, num_classes=3)).eval()


class _Holder(nn.Module):
    """A network as an attribute of another, as in Lightning."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        setattr(self, name, network)


def _saver(ema: bool) -> Callable[[nn.Module, Path], Path]:
    """timm's train.py."""
    def save(network: nn.Module, folder: Path) -> Path:
        last = create_model(MODEL, num_classes=3)
        saver = CheckpointSaver(
            model=last if ema else network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
            args=argparse.Namespace(model=MODEL, lr=0.1, opt_betas=None),
            model_ema=ModelEmaV3(network) if ema else None, checkpoint_dir=str(folder), recovery_dir=str(folder))
        saver.save_checkpoint(3, metric=71.25)
        return folder / 'last.pth.tar'
    return save


def _saves(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module, Path], Path]:
    def save(network: nn.Module, folder: Path) -> Path:
        torch.save(make(network), folder / 'file.pth')
        return folder / 'file.pth'
    return save


def _compiled_part(network: nn.Module) -> dict[str, torch.Tensor]:
    part = create_model(MODEL, num_classes=3)
    part.load_state_dict(network.state_dict())
    part.blocks[1] = torch.compile(part.blocks[1])
    return part.state_dict()


def _counted(network: nn.Module) -> dict[str, Any]:
    """What thop leaves in a network that it counted."""
    counters = {f'{name}.{counter}'.lstrip('.'): torch.zeros(1, dtype=torch.float64)
                for name, _ in network.named_modules() for counter in ('total_ops', 'total_params')}
    return {**network.state_dict(), **counters}


def _transformers(network: nn.Module, folder: Path) -> Path:
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture=MODEL, num_labels=3, do_pooling=True)
    wrapper = transformers.TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(network.state_dict())
    wrapper.save_pretrained(folder)
    return folder / 'model.safetensors'


def _safetensors(network: nn.Module, folder: Path) -> Path:
    save_model(network, str(folder / 'a file of any name'), {'format': 'pt', 'epoch': '3'})
    return folder / 'a file of any name'


# How each is made, what the reader says about it, and what it leaves out.
FORMS: dict[str, tuple[Callable[[nn.Module, Path], Path], str, str]] = {
    'timm': (_saver(False), 'state_dict', 'optimizer'),
    'timm with EMA': (_saver(True), EMA, 'state_dict'),
    'empty EMA': (_saves(lambda n: {EMA: {}, 'state_dict': n.state_dict()}), 'state_dict', EMA),
    'numpy accuracies': (_saves(lambda n: {
        'state_dict': n.state_dict(), 'best_prec1': np.float64(71.25), 'best_acc1': np.float32(71.5),
        'epoch': np.int64(3), 'rank': np.array(0)[()]}), 'state_dict', 'best_acc1'),
    'net': (_saves(lambda n: {'net': n.state_dict(), 'best_prec1': [71.25]}), 'net', 'best_prec1'),
    'official, without counts': (_saves(lambda n: {
        f'module.{key}': value for key, value in to_official(n.state_dict()).items()
        if not key.endswith('num_batches_tracked')}), "keys without 'module.'", ''),
    'float16 parameters': (_saves(lambda n: {
        key: nn.Parameter(value.half()) if value.is_floating_point() else value
        for key, value in n.state_dict().items()}), '', ''),
    'compiled outside': (
        _saves(lambda n: torch.compile(nn.DataParallel(n)).state_dict()), "keys without '_orig_mod.', 'module.'", ''),
    'compiled in part': (_saves(_compiled_part), "keys without '_orig_mod.'", ''),
    'averaged': (
        _saves(lambda n: torch.optim.swa_utils.AveragedModel(n).state_dict()), "keys without 'module.'", 'n_averaged'),
    'Lightning': (
        _saves(lambda n: {'state_dict': {'criterion.weight': torch.ones(3), **_Holder('model', n).state_dict()}}),
        "state_dict, keys without 'model.'", 'criterion.*'),
    'thop': (_saves(_counted), '', 'total_ops'),
    'safetensors': (_safetensors, '', ''),
    'transformers': (_transformers, "keys without 'timm_model.'", ''),
}


@pytest.mark.parametrize('form', [
    pytest.param(form, marks=pytest.mark.slow) if form in ('transformers', 'compiled in part') else form
    for form in FORMS])
def test_what_is_read(form: str, network: nn.Module, tmp_path: Path):
    make, part, left_out = FORMS[form]
    content = read_checkpoint(make(network, tmp_path))
    assert content.part == part
    assert content.best_prec1 == (71.25 if 'accuracies' in form else None)
    assert left_out in (*content.left_out, '')
    wanted, found = to_official(network.state_dict()), to_official(content.state_dict)
    assert [key for key in wanted if key not in found and not key.endswith('num_batches_tracked')] == []
    rounded = 'float16' in form
    assert all(value.equal(wanted[key].half().float() if rounded and value.is_floating_point() else wanted[key])
               for key, value in found.items())


def test_keys_that_look_like_a_wrapper(network: nn.Module, tmp_path: Path):
    """A stray `model.temperature` does not hide the network beside it."""
    torch.save({**network.state_dict(), 'model.temperature': torch.ones(1)}, tmp_path / 'file.pth')
    content = read_checkpoint(tmp_path / 'file.pth')
    assert (content.part, content.left_out) == ('', ())
    with pytest.raises(CheckpointError, match=r'model\.temperature is not known'):
        convert(content, tmp_path / 'output')


@pytest.mark.parametrize('form', [
    'timm with EMA', *(pytest.param(form, marks=pytest.mark.slow) for form in ('thop', 'transformers'))])
def test_convert_and_finetune_read_it(form: str, network: nn.Module, tmp_path: Path):
    (tmp_path / 'source').mkdir()
    path = FORMS[form][0](network, tmp_path / 'source')
    content = read_checkpoint(path)
    done = convert(path, tmp_path / 'output')
    assert done.checkpoint.part == content.part
    started, start = create_with_weights(Settings('digits', model=MODEL, initial_checkpoint=str(path)), 'abc')
    assert content.part in start
    wanted = network.state_dict()
    for loaded in (create_model(f'local-dir:{done.folder}', pretrained=True), started):
        found = loaded.state_dict()
        assert found.keys() == wanted.keys()
        different = [key for key, value in wanted.items() if not torch.equal(found[key], value)]
        # A classifier of other classes, which these may be, is made anew.
        assert all(key.startswith('classifier.') for key in different), different


def test_last_weights_instead_of_their_average(network: nn.Module, tmp_path: Path):
    """Of a file with both. `verify` compares with those that the folder was made of."""
    path = _saver(True)(network, tmp_path)
    last = read_checkpoint(path, use_ema=False)
    assert last.part == 'state_dict'
    assert EMA in last.left_out
    assert not torch.equal(last.state_dict['conv_stem.weight'], network.state_dict()['conv_stem.weight'])
    folder = convert(path, tmp_path / 'output', use_ema=False).folder
    checks = list(verify(folder, path))
    assert [check for check in checks if check.ok is False] == []
    assert any('equal to the source' in check.what for check in checks)
    settings = Settings('digits', model=MODEL, initial_checkpoint=str(path), ema=False)
    model, start = create_with_weights(settings, 'abc')
    assert 'state_dict)' in start
    assert torch.equal(model.state_dict()['conv_stem.weight'], last.state_dict['conv_stem.weight'])


def test_tensors_that_share_memory(network: nn.Module, tmp_path: Path):
    """Two names of one tensor, overlapping parts of one storage, other strides: all are written by themselves."""
    state_dict = {key: value.clone() for key, value in network.state_dict().items()}
    both = torch.rand(24)
    state_dict['bn1.weight'], state_dict['bn1.bias'] = both[:16], both[8:]
    state_dict['bn1.running_var'] = state_dict['bn1.weight']
    state_dict['conv_head.weight'] = state_dict['conv_head.weight'].transpose(0, 1).contiguous().transpose(0, 1)
    torch.save({'state_dict': state_dict, 'optimizer': torch.rand(999)}, tmp_path / 'views.pth')
    folder = convert(tmp_path / 'views.pth', tmp_path / 'output').folder
    found = create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state_dict.items())


def test_eca_ns(tmp_path: Path):
    """The authors' `eca_ns.py` has a kernel for each channel: (C, 1, k)."""
    network = create_model('eca_resnet18', attn_layer='eca_ns', kernel_sizes=(3, 3, 5, 5), num_classes=4)
    official = to_official(network.state_dict())
    assert official['layer4.1.eca.conv.weight'].shape == (512, 1, 5)
    torch.save({f'module.{key}': value for key, value in official.items()}, tmp_path / 'ns.pth')
    done = convert(tmp_path / 'ns.pth', tmp_path / 'output')
    assert done.identity == ('eca_resnet18', (3, 3, 5, 5), 4, 3, 'eca_ns')
    loaded = create_model(f'local-dir:{done.folder}', pretrained=True)
    back = to_official(loaded.state_dict())
    assert list(back) == list(official)
    assert all(torch.equal(back[key], value) for key, value in official.items())
    assert 'ECA-NS' in (done.folder / 'README.md').read_text()
