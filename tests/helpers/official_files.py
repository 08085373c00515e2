"""Checkpoints in the format of the authors' files, made from a recipe, and the logits of the authors' code for them."""
import functools
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch

import timm_eca  # noqa: F401 (registers the models)
from timm_eca.weights.key_maps import to_official
from timm_eca.weights.official import OFFICIAL

SEED = 2020
GOLDEN = Path(__file__).parents[1] / 'golden' / 'official_logits.npz'
# Name of each golden result: the registered model and the kernel sizes of the file.
ENTRIES: dict[str, tuple[str, tuple[int, ...]]] = {
    'eca_resnet18_k3577': ('eca_resnet18', (3, 5, 7, 7)),
    'eca_resnet34_k3357': ('eca_resnet34', (3, 3, 5, 7)),
    'eca_resnet50_k3557': ('eca_resnet50', (3, 5, 5, 7)),
    'eca_resnet50_k3333': ('eca_resnet50', (3, 3, 3, 3)),
    'eca_resnet101_k3357': ('eca_resnet101', (3, 3, 5, 7)),
    'eca_resnet152_k3357': ('eca_resnet152', (3, 3, 5, 7)),
    'eca_mobilenetv2_k13': ('eca_mobilenetv2', (1, 1, 1, 1, 3, 3, 3)),
}


def golden(name: str) -> tuple[torch.Tensor, list[str]]:
    """The official code's logits, shape (2, 1000), and its state dict's keys."""
    with np.load(GOLDEN) as file:
        return torch.from_numpy(file[name]), [str(key) for key in file[f'{name}.keys']]


def golden_input() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(SEED).standard_normal((2, 3, 128, 128)).astype(np.float32))


def recipe_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that the golden recipe gives an official key."""
    rng = np.random.default_rng([SEED, zlib.crc32(key.encode())])
    if key.endswith('num_batches_tracked'):
        return torch.tensor(0)
    if key.endswith('running_var'):
        values = rng.uniform(0.5, 1.5, shape)
    elif key.endswith(('running_mean', 'bias')):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 3:
        values = 0.5 * rng.standard_normal(shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def official_state_dict(model: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A state dict as the official code has it, filled by the recipe; `kwargs` go to `timm.create_model`.

    The dict is the caller's own, its tensors are shared.
    """
    return dict(_official_tensors(model, **kwargs))


@functools.lru_cache(maxsize=4)
def _official_tensors(model: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    shapes = to_official(timm.create_model(model, device='meta', **kwargs).state_dict())
    return {key: recipe_tensor(key, tuple(value.shape)) for key, value in shapes.items()}


def save_official(path: Path, state_dict: dict[str, Any], prefix: str = 'module.', **content: Any) -> Path:
    """Writes a file as the authors' are: legacy serialization, tensors on cuda:0, optimizer and the rest beside it.

    A name of the authors' files gets the accuracy that they report (`best_prec1`).
    """
    top1 = next((official.top1 for official in OFFICIAL.values() if official.file == path.name), 50.)
    wrapped = {
        'epoch': 100,
        'arch': 'se_resnet50',
        'state_dict': {f'{prefix}{key}': value for key, value in state_dict.items()},
        'best_prec1': torch.tensor(top1),
        'optimizer': {'state': {0: {'momentum_buffer': torch.ones(8)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
        **content,
    }
    # The device of a tensor is written as a tag beside its data: no GPU is needed to write one.
    with mock.patch('torch.serialization.location_tag', return_value='cuda:0'):
        torch.save(wrapped, path, _use_new_zipfile_serialization=False)
    return path
