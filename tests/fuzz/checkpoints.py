"""Feeds mutated checkpoints to the converter.

A case is a state dict, small or whole, changed in its structure and saved in one of torch's two formats. The converter
has to end with one sentence that names the file, or with a folder that is right. It may run no code, write nothing
elsewhere, leave nothing behind, and take little memory. Torch finds damaged bytes: they are not tested here.
"""
import copy
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from outcome import check_sentence, limited_memory
from hypothesis import strategies
from safetensors.torch import load_file
from timm.models import create_model

import timm_eca  # noqa: F401 (registers the models)
from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.weights.key_maps import to_official

__all__ = ['CheckpointCase', 'check_checkpoint', 'checkpoint_cases']

MODEL = 'eca_mobilenetv2_050'


class RunsCode:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


class Subclass(torch.Tensor):
    """A tensor of a type of somebody's own."""


@dataclass(frozen=True)
class CheckpointCase:
    """A checkpoint file: what it was made of, and how it was changed."""
    whole: bool
    legacy: bool
    wrapped: bool
    structure: list[tuple[str, int, int]] = field(default_factory=list)


VALUES: list[Callable[[torch.Tensor, Path], Any]] = [
    lambda t, canary: RunsCode(canary),
    lambda t, canary: None,
    lambda t, canary: 2 ** 100,
    lambda t, canary: float('nan'),
    lambda t, canary: 'text\n\x1b[31m' * 50,
    lambda t, canary: b'bytes',
    lambda t, canary: [t, [t]],
    lambda t, canary: {'nested': {'deeper': t}},
    lambda t, canary: (t,),
    lambda t, canary: torch.Size([3, 3]),
    lambda t, canary: t.double(),
    lambda t, canary: t.half(),
    lambda t, canary: t.bfloat16(),
    lambda t, canary: t.to(torch.int8),
    lambda t, canary: t.to(torch.complex64),
    lambda t, canary: t.to(torch.bool),
    lambda t, canary: t.to(torch.float8_e4m3fn),
    lambda t, canary: t.to_sparse(),
    lambda t, canary: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t, canary: t.to('meta'),
    lambda t, canary: torch.nn.Parameter(t.float()),
    lambda t, canary: t.float().as_subclass(Subclass),
    lambda t, canary: torch.zeros(1).expand(2 ** 40),
    lambda t, canary: torch.zeros(2)[:1].expand(t.shape) if t.dim() else torch.zeros(2)[0],
    lambda t, canary: t.flatten(),
    lambda t, canary: t.unsqueeze(0),
    lambda t, canary: t[:0] if t.dim() else t,
    lambda t, canary: t.float() * float('inf'),
    lambda t, canary: t.float().transpose(0, -1) if t.dim() else t,
    lambda t, canary: torch.cat([t.flatten(), t.flatten()]),
    lambda t, canary: torch.zeros(0),
    lambda t, canary: torch.empty(2 ** 22),
]
KEYS: list[Callable[[str], Any]] = [
    lambda key: f'module.{key}', lambda key: f'module.module.{key}', lambda key: f'backbone.{key}',
    lambda key: key.upper(), lambda key: key + '\x00', lambda key: '', lambda key: '../../' + key,
    lambda key: key[:99] * 500, lambda key: 7, lambda key: (key,), lambda key: None,
    lambda key: key.replace('conv', 'eca.conv'), lambda key: 'classifier.1.weight',
]
STRUCTURE = ['value', 'key', 'remove', 'alias', 'swap', 'add', 'nest', 'content']


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


def _state_dicts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    whole = to_official(create_model(MODEL, num_classes=0).state_dict())
    kept = ('features.0.', 'features.1.conv')
    return {k: v for k, v in whole.items() if k.startswith(kept)}, whole


STATE_DICTS = _state_dicts()


def _value(number: int, tensor: torch.Tensor, canary: Path) -> Any:
    try:
        return VALUES[number % len(VALUES)](tensor, canary)
    except (RuntimeError, TypeError):  # torch can't make this kind of tensor from that one
        return None


def _change(state_dict: dict[Any, Any], kind: str, first: int, second: int, canary: Path) -> Any:
    """A state dict after one change of its structure."""
    keys = list(state_dict)
    if not keys:
        return state_dict
    key, other = keys[first % len(keys)], keys[second % len(keys)]
    value = state_dict[key] if isinstance(state_dict[key], torch.Tensor) else torch.ones(3, 1)
    if kind == 'value':
        state_dict[key] = _value(second, value, canary)
    elif kind == 'key':
        change = KEYS[second % len(KEYS)]
        if first % 3:
            state_dict[change(str(key))] = state_dict.pop(key)
        else:
            state_dict = {change(str(k)): v for k, v in state_dict.items()}
    elif kind == 'remove':
        for name in keys[first % len(keys)::1 + second % 9]:
            del state_dict[name]
    elif kind in ('alias', 'swap'):
        state_dict[key], before = state_dict[other], state_dict[key]
        if kind == 'swap':
            state_dict[other] = before
    elif kind == 'add':
        state_dict[f'extra.{first}'] = _value(second, value, canary)
    elif kind == 'nest':
        for _ in range(1 + second % 40):
            state_dict = {('state_dict', 'model', key)[first % 3]: state_dict}
    else:
        return _value(second, value, canary)
    return state_dict


def _save(case: CheckpointCase, canary: Path) -> bytes:
    content: Any = copy.copy(STATE_DICTS[case.whole])
    for kind, first, second in case.structure:
        content = _change(content, kind, first, second, canary) if isinstance(content, dict) else content
    if case.wrapped:
        content = {'epoch': 1, 'arch': 'x', 'state_dict': content, 'best_prec1': torch.tensor(1.0)}
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer, _use_new_zipfile_serialization=not case.legacy)
    except Exception:  # torch does not save it
        torch.save(STATE_DICTS[0], buffer)
    return buffer.getvalue()


def check_checkpoint(case: CheckpointCase) -> str:
    """Runs one case, and returns its outcome: `converted`, or the beginning of the sentence.

    Raises:
        AssertionError: The converter did something that it must not do.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, of the kinds of tensors that it deprecates
        root = Path(folder)
        canary, path, output = root / 'canary', root / 'file.pth.tar', root / 'output'
        data = _save(case, canary)
        path.write_bytes(data)
        try:
            with limited_memory(len(data)):
                done = convert(path, output)
        except CheckpointError as e:
            sentence = check_sentence(e, 'file.pth.tar')
            assert os.listdir(root) == ['file.pth.tar'], os.listdir(root)
            return sentence
        assert sorted(os.listdir(root)) == ['file.pth.tar', 'output']
        assert all(value.isfinite().all() for value in load_file(done.folder / 'model.safetensors').values())
        return 'converted'
