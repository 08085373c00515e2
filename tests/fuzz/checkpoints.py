"""Feeds mutated checkpoints to the converter.

A case is a state dict, small or whole, changed in its structure and saved in one of torch's two formats. The converter
has to end with one sentence that names the file, or with a folder that is right. It may run no code, write nothing
elsewhere, and leave nothing behind. Torch finds damaged bytes: they are not tested here.
"""
import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies
from outcome import check_sentence
from safetensors.torch import load_file
from timm.models import create_model

import timm_eca  # noqa: F401 (registers the models)
from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.weights.key_maps import to_official

__all__ = ['CheckpointCase', 'check_checkpoint', 'checkpoint_cases']

MODEL = 'eca_mobilenetv2_050'
CANARY = 'canary'


class RunsCode:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (CANARY,)


class Subclass(torch.Tensor):
    """A tensor of a type of somebody's own."""


@dataclass(frozen=True)
class CheckpointCase:
    """A checkpoint file: what it was made of, and how it was changed."""
    whole: bool
    legacy: bool
    wrapped: bool
    structure: list[tuple[str, int, int]] = field(default_factory=list)


VALUES: list[Callable[[torch.Tensor], Any]] = [
    lambda t: RunsCode(), lambda t: None, lambda t: 2 ** 100, lambda t: float('nan'), lambda t: 'text\n\x1b[31m' * 50,
    lambda t: b'bytes', lambda t: [t, [t]], lambda t: {'nested': {'deeper': t}}, lambda t: torch.Size([3, 3]),
    lambda t: t.double(), lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.to(torch.int8),
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.bool), lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(), lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to('meta'), lambda t: torch.nn.Parameter(t.float()), lambda t: t.float().as_subclass(Subclass),
    lambda t: torch.zeros(1).expand(2 ** 40), lambda t: torch.zeros(2)[:1].expand(t.shape), lambda t: t.flatten(),
    lambda t: t.unsqueeze(0), lambda t: t[:0], lambda t: t.float() * float('inf'),
    lambda t: t.float().transpose(0, -1), lambda t: torch.zeros(0), lambda t: torch.empty(2 ** 22),
]
KEYS: list[Callable[[str], Any]] = [
    lambda key: f'module.{key}', lambda key: f'module.module.{key}', lambda key: f'backbone.{key}',
    lambda key: key.upper(), lambda key: key + '\x00', lambda key: '', lambda key: '../../' + key,
    lambda key: key[:99] * 500, lambda key: 7, lambda key: (key,), lambda key: None,
    lambda key: key.replace('conv', 'eca.conv'), lambda key: 'classifier.1.weight',
]
STRUCTURE = ['value', 'key', 'keys', 'remove', 'alias', 'swap', 'nest', 'content']


def checkpoint_cases() -> strategies.SearchStrategy[CheckpointCase]:
    """All cases. One in eight has a whole network, which takes longer."""
    number = strategies.integers(0, 2 ** 32 - 1)
    return strategies.builds(
        CheckpointCase,
        whole=strategies.integers(0, 7).map(lambda n: n == 0),
        legacy=strategies.booleans(),
        wrapped=strategies.booleans(),
        structure=strategies.lists(strategies.tuples(strategies.sampled_from(STRUCTURE), number, number), max_size=3),
    )


torch.manual_seed(0)
WHOLE = to_official(create_model(MODEL, num_classes=0).state_dict())
PART = {key: value for key, value in WHOLE.items() if key.startswith(('features.0.', 'features.1.conv'))}


def _value(number: int, tensor: torch.Tensor) -> Any:
    try:
        return VALUES[number % len(VALUES)](tensor)
    except (IndexError, RuntimeError, TypeError):  # torch can't make this kind of tensor from that one
        return None


def _change(state_dict: dict[Any, Any], kind: str, first: int, second: int) -> Any:
    """A state dict after one change of its structure."""
    keys = list(state_dict)
    if not keys:
        return state_dict
    key, other = keys[first % len(keys)], keys[second % len(keys)]
    value = state_dict[key] if isinstance(state_dict[key], torch.Tensor) else torch.ones(3, 1)
    change = KEYS[second % len(KEYS)]
    if kind == 'value':
        state_dict[key] = _value(second, value)
    elif kind == 'key':
        state_dict[change(str(key))] = state_dict.pop(key)
    elif kind == 'keys':
        return {change(str(k)): v for k, v in state_dict.items()}
    elif kind == 'remove':
        for name in keys[first % len(keys)::1 + second % 9]:
            del state_dict[name]
    elif kind == 'alias':
        state_dict[key] = state_dict[other]
    elif kind == 'swap':
        state_dict[key], state_dict[other] = state_dict[other], state_dict[key]
    elif kind == 'nest':
        for _ in range(1 + second % 40):
            state_dict = {('state_dict', 'model', key)[first % 3]: state_dict}
    else:
        return _value(second, value)
    return state_dict


def _save(case: CheckpointCase, path: Path) -> None:
    content: Any = copy.copy(WHOLE if case.whole else PART)
    for kind, first, second in case.structure:
        content = _change(content, kind, first, second) if isinstance(content, dict) else content
    if case.wrapped:
        content = {'epoch': 1, 'arch': 'x', 'state_dict': content, 'best_prec1': torch.tensor(1.0)}
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not case.legacy)
    except Exception:  # torch does not save it
        torch.save(PART, path)


def check_checkpoint(case: CheckpointCase) -> str:
    """Runs one case, and returns its outcome: `converted`, or the beginning of the sentence.

    Raises:
        AssertionError: The converter did something that it must not do.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, of the kinds of tensors that it deprecates
        path = Path(folder) / 'file.pth.tar'
        _save(case, path)
        try:
            done = convert(path, Path(folder) / 'output')
        except CheckpointError as e:
            sentence = check_sentence(e, path.name)
            assert os.listdir(folder) == [path.name], os.listdir(folder)
        else:
            sentence = 'converted'
            assert sorted(os.listdir(folder)) == [path.name, 'output']
            assert all(value.isfinite().all() for value in load_file(done.folder / 'model.safetensors').values())
        assert not os.path.exists(CANARY)
        return sentence
