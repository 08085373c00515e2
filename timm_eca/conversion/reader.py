"""Reads the tensors of a checkpoint file, running no code from it."""
import argparse
import os
import pickle
import re
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import load_file

from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.archive import ArchiveError, check_archive
from timm_eca.weights.digests import file_sha256

__all__ = ['Checkpoint', 'CheckpointError', 'read_checkpoint']

_EMA_KEYS = ('state_dict_ema', 'model_ema')
_STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict', 'net', 'network')
# DataParallel, Lightning, transformers, mmdetection
_WRAPPERS = ('module.', 'model.', 'net.', 'encoder.', 'timm_model.', 'backbone.')
_COUNTERS = ('total_ops', 'total_params', 'n_averaged')  # of thop, and of torch's AveragedModel
_lock = threading.Lock()  # torch has one list of safe classes for all threads


class CheckpointError(TimmEcaError, ValueError):
    """A checkpoint that can't be read or converted, or an output that can't be written; says what to do about it."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""
    state_dict: dict[str, torch.Tensor]  # floating point tensors are float32; without the prefixes of wrappers
    sha256: str  # of the file
    part: str  # which entry of the file was read, and the prefixes that were removed, in words; may be empty
    left_out: tuple[str, ...]  # what else the file holds
    best_prec1: float | None  # top-1 accuracy in percent that the file claims


class _NumpyType:
    """Stands for `numpy.dtype` in a pickle."""

    def __init__(self, name: str, *args: Any) -> None:
        self.format = {'f4': '<f', 'f8': '<d'}.get(name)

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment


def _numpy_number(dtype: _NumpyType, data: bytes) -> float | None:
    """Stands for numpy's own function, which would make values of any size and type."""
    return struct.unpack(dtype.format, data)[0] if dtype.format else None


# What may stand beside weights: the options of timm's train.py, and accuracies as numpy's numbers.
_SAFE: list[Any] = [
    argparse.Namespace, (_NumpyType, 'numpy.dtype'), (_numpy_number, 'numpy.core.multiarray.scalar'),
    (_numpy_number, 'numpy._core.multiarray.scalar')]


def read_checkpoint(path: str | os.PathLike, use_ema: bool = True) -> Checkpoint:
    """Reads the tensors of a checkpoint file, running no code from it.

    Reads what `torch.save` has written in its legacy or zip format, and safetensors. The state dict may be the whole
    file or an entry of it, and its keys may have the prefixes of wrappers (DataParallel, `torch.compile`, Lightning,
    mmdetection). float16 and bfloat16 tensors are widened to float32, which loses nothing; float64 is refused.

    Args:
        path: The file.
        use_ema: Prefer the averaged weights (EMA) where the file has both.

    Raises:
        CheckpointError: The file is of another kind, is damaged, or holds more than finite tensors.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a directory: name the file itself, not what was unpacked of it.')
    if os.path.exists(path) and not os.path.isfile(path):  # but e.g. a device that never ends
        raise CheckpointError(f'{path} is not a file: name a checkpoint.')
    try:
        with path.open('rb') as file:
            sha256 = file_sha256(path)
            size = os.fstat(file.fileno()).st_size
            content = _load(path, file, size)
    except OSError as e:
        raise CheckpointError(f'{path} can\'t be read ({e.strerror or e}): name an existing checkpoint file.') from None

    tensors, part, left_out = _unwrap(path, content, use_ema)
    try:
        best_prec1 = float(content['best_prec1'])
    except Exception:  # a file may hold anything under this name
        best_prec1 = None
    del content  # the optimizer's state is as large as the weights
    state_dict = {}
    for key, value in tensors.items():
        try:
            state_dict[key] = _check_tensor(key, value, size)
        except ValueError as e:
            raise CheckpointError(
                f'{path}: {printable(key)!r} {e}: save the weights of a trained network as dense float32 tensors.'
            ) from None
        size -= value.nbytes
    return Checkpoint(state_dict, sha256, part, left_out, best_prec1)


def _load(path: Path, file: IO[bytes], size: int) -> Any:
    head = file.read(512)
    file.seek(0)
    if re.match(rb'\s*<(!doctype|html|\?xml|head|body)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint. Google Drive sends one to ask for a confirmation, or when a '
            'quota is used up: download the checkpoint again in a browser.')
    try:
        if head[8:9] == b'{':
            return load_file(path)
        check_archive(path)
        with _lock, torch.serialization.safe_globals(_SAFE):
            return torch.load(file, map_location='cpu', weights_only=True)
    except ArchiveError as e:
        raise CheckpointError(f'{path} is {e}: name it as torch.save wrote it.') from None
    except Exception as e:  # damaged files raise many kinds
        unsafe = re.search(r'GLOBAL (\S+)', str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if unsafe is not None:
            raise CheckpointError(
                f'{path} holds more than tensors and plain values. Loading it would run {printable(unsafe[1])}, so it '
                'was refused: save only the state_dict where the file was made, and use that.') from None
        raise CheckpointError(
            f'{path} is cut off or damaged, or not of torch.save or safetensors ({type(e).__name__}, {size} bytes): '
            'download it again, or name a checkpoint.') from None


def _unwrap(path: Path, content: Any, use_ema: bool) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The tensors of a checkpoint without the prefixes of their keys, what was read, and what was left out."""
    entries = (*_EMA_KEYS, *_STATE_DICT_KEYS) if use_ema else (*_STATE_DICT_KEYS, *_EMA_KEYS)
    wrapped = isinstance(content, Mapping)
    entry = next((key for key in entries if wrapped and isinstance(content.get(key), Mapping)), None)
    state_dict = content if entry is None else content[entry]
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError(f'{path} is not a state dict, which has tensors by name: save model.state_dict().')
    if not state_dict:
        raise CheckpointError(f'{path} holds an empty state dict: name a checkpoint with weights.')
    left_out = [] if entry is None else [printable(str(key)) for key in content if key != entry]
    left_out += sorted({key.rpartition('.')[2] for key in state_dict}.intersection(_COUNTERS))
    tensors = {key: value for key, value in state_dict.items() if key.rpartition('.')[2] not in _COUNTERS}

    removed: list[str] = []
    if any('_orig_mod.' in key for key in tensors):  # torch.compile, of the whole or of parts
        tensors, removed = {key.replace('_orig_mod.', ''): value for key, value in tensors.items()}, ['_orig_mod.']
    for _ in range(8):  # wrappers within wrappers
        prefix = next((prefix for prefix in _WRAPPERS if any(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            break
        outside = next((key for key in tensors if not key.startswith(prefix)), None)
        if outside is not None and prefix != 'backbone.':  # beside which mmdetection has the rest of the detector
            raise CheckpointError(
                f'{path} is not one network, it has {printable(outside)!r} beside keys that start with {prefix!r}: '
                'save the state_dict of one network.')
        left_out += sorted({f'{printable(key.partition(".")[0])}.*' for key in tensors} - {f'{prefix}*'})
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        removed.append(prefix)
    prefixes = f'keys without {", ".join(map(repr, removed))}' if removed else ''
    return tensors, ', '.join(filter(None, (entry, prefixes))), tuple(left_out)


def _check_tensor(key: str, value: Any, room: int) -> torch.Tensor:
    """A tensor as it is used: detached, float16 and bfloat16 widened.

    Raises:
        ValueError: It can't be a weight, or is larger than the room that the other tensors leave in the file.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f'is a {type(value).__name__} and not a tensor')
    if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
        raise ValueError('is a sparse, quantized or empty (meta) tensor')
    if value.nbytes > room:  # copies of tensors that share memory would take it without a bound
        raise ValueError('is larger than its data, or shares it: all tensors are larger than the file')
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if key.endswith('num_batches_tracked') and value.dtype != torch.int64:
        raise ValueError(f'is of {value.dtype} and no count')
    if value.dtype not in (torch.float32, torch.int64, torch.bool):
        raise ValueError(f'is of {value.dtype}, which is not converted silently')
    if not value.isfinite().all():
        raise ValueError('has NaN or Inf in it')
    return value.detach()
