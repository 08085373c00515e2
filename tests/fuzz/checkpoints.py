"""Feeds mutated checkpoints to the converter.

A case is a state dict, small or whole, changed in its structure and saved in one of torch's two formats. The converter
has to end with one sentence that names the file, or with a folder that is right. It may run no code, write nothing
elsewhere, and leave nothing behind. Torch finds damaged bytes: they are not tested here.
"""
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
KINDS = ['value', 'key', 'keys', 'remove', 'swap', 'alias', 'nest', 'content']

torch.manual_seed(0)
WHOLE = to_official(create_model(MODEL, num_classes=0).state_dict())
PART = {key: value for key, value in WHOLE.items() if key.startswith(('features.0.', 'features.1.conv'))}


class CheckpointCase(NamedTuple):
    """A checkpoint file: what it was made of, and how it was changed: kinds, the keys, and numbers of a value."""
    whole: bool
    legacy: bool
    wrapped: bool
    changes: list[tuple[str, str, str, int]]


def checkpoint_cases() -> strategies.SearchStrategy[CheckpointCase]:
    """All cases. One in eight has a whole network, which takes longer."""
    keys = strategies.sampled_from(list(PART))
    changes = strategies.tuples(strategies.sampled_from(KINDS), keys, keys, strategies.integers(0, 999))
    return strategies.builds(
        CheckpointCase,
        whole=strategies.integers(0, 7).map(lambda n: n == 0),
        legacy=strategies.booleans(),
        wrapped=strategies.booleans(),
        changes=strategies.lists(changes, max_size=3),
    )


def _value(number: int, tensor: Any) -> Any:
    try:
        return VALUES[number % len(VALUES)](tensor)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # this can't be made of that
        return None


def _change(state_dict: dict[Any, Any], kind: str, key: str, other: str, number: int) -> Any:
    """A state dict after one change of its structure."""
    change = KEYS[number % len(KEYS)]
    if kind == 'value':
        return {**state_dict, key: _value(number, state_dict.get(key))}
    if kind in ('key', 'keys'):
        return {change(str(k)) if kind == 'keys' or k == key else k: v for k, v in state_dict.items()}
    if kind == 'remove':
        return {k: v for i, (k, v) in enumerate(state_dict.items()) if (i + number) % (1 + number % 9)}
    if kind == 'swap':
        return {**state_dict, key: state_dict.get(other), other: state_dict.get(key)}
    if kind == 'alias':
        return {**state_dict, key: state_dict.get(other)}
    if kind == 'content':
        return _value(number, state_dict.get(key))
    for _ in range(1 + number % 40):
        state_dict = {('state_dict', 'model', key)[number % 3]: state_dict}
    return state_dict


def _save(case: CheckpointCase, path: Path) -> None:
    content: Any = WHOLE if case.whole else PART
    for change in case.changes:
        content = _change(content, *change) if isinstance(content, dict) else content
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
