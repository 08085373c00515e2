"""Reads the tensors of a checkpoint file, running no code from it."""
import argparse
import os
import pickle
import re
import struct
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.archive import ArchiveError, check_archive
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import check_regular_file

__all__ = ['Checkpoint', 'CheckpointError', 'read_checkpoint']

_LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # what torch.save wrote first before it wrote zip files
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict', 'net', 'network')
_WRAPPERS = ('module.', 'model.', 'net.', 'encoder.', 'timm_model.')  # DataParallel, Lightning, transformers
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
    widened: tuple[str, ...]  # data types that were made float32
    best_prec1: float | None  # top-1 accuracy in percent that the file claims


class _NumpyType:
    """Stands for `numpy.dtype` in a pickle."""

    def __init__(self, name: str, *args: Any) -> None:
        self.format = {'f4': 'f', 'f8': 'd', 'i4': 'i', 'i8': 'q'}.get(name, '')

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment; files of big-endian machines are not known


def _numpy_scalar(dtype: _NumpyType, data: bytes) -> float | None:
    """Stands for numpy's own function, which would make values of any size."""
    return struct.unpack(f'<{dtype.format}', data)[0] if dtype.format else None


# What may stand beside weights: the options of timm's train.py, and accuracies as numpy's numbers.
_SAFE: list[Any] = [
    argparse.Namespace, (_NumpyType, 'numpy.dtype'), (_numpy_scalar, 'numpy.core.multiarray.scalar'),
    (_numpy_scalar, 'numpy._core.multiarray.scalar'),
]


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
    try:
        if path.is_dir():
            raise CheckpointError(
                f'{path} is a directory, perhaps a checkpoint that was unpacked into a folder: name the file itself.')
        check_regular_file(path)
        with path.open('rb') as file:
            safe = _check_format(path, file)
            sha256 = file_sha256(path)
            file.seek(0)
            content = _load_safetensors(path) if safe else _load_pickle(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise CheckpointError(f'{path} can\'t be read ({e.strerror or e}): name an existing checkpoint file.') from None

    tensors, part, left_out = _unwrap(path, content, use_ema)
    best_prec1 = _number(content.get('best_prec1'))
    del content  # the optimizer's state is as large as the weights
    state_dict, widened = {}, set()
    for key, value in tensors.items():
        state_dict[key] = _check_tensor(path, key, value)
        size -= value.nbytes
        if size < 0:  # separate copies of them would take memory without a bound
            raise CheckpointError(f'{path}: its tensors share memory, they are larger than the file: save copies.')
        if state_dict[key].dtype != value.dtype:
            widened.add(str(value.dtype).removeprefix('torch.'))
    return Checkpoint(state_dict, sha256, part, left_out, tuple(sorted(widened)), best_prec1)


def _check_format(path: Path, file: IO[bytes]) -> bool:
    """Whether a file is in the safetensors format; a CheckpointError unless that or `torch.save` wrote it."""
    head = file.read(512)
    if _LEGACY_MAGIC.startswith(head):
        raise CheckpointError(f'{path} is {"cut off" if head else "empty"}: download the checkpoint again.')
    if head.startswith((_LEGACY_MAGIC, b'PK\x03\x04')):
        try:
            check_archive(path)
        except ArchiveError as e:
            raise CheckpointError(
                f'{path} is {e}: download the checkpoint again, and name it as torch.save wrote it.') from None
        return False
    if head[8:9] == b'{':
        return True
    if re.match(rb'\s*<(!doctype|html|\?xml|head|body)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint. Google Drive sends one to ask for a confirmation, or when a '
            'quota is used up: download the checkpoint again in a browser.')
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive, which the authors\' .pth.tar files are not, in spite of their name: unpack it '
            'and name the checkpoint in it.')
    raise CheckpointError(f'{path} is not a file that torch.save or safetensors wrote: name a checkpoint.')


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as e:  # a KeyError for a data type that torch doesn't have
        raise _damaged(path, e) from None


def _load_pickle(path: Path, file: IO[bytes]) -> Any:
    try:
        with _lock, torch.serialization.safe_globals(_SAFE):
            return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:  # damaged files raise many kinds
        unsafe = re.search(r'GLOBAL (\S+)', str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if unsafe is None:
            raise _damaged(path, e) from None
        raise CheckpointError(
            f'{path} holds more than tensors and plain values. Loading it would run {printable(unsafe[1])}, so it was '
            'refused: save only the state_dict where the file was made, and use that.') from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'{path} is cut off or damaged ({type(error).__name__}, {path.stat().st_size} bytes): download the checkpoint '
        'again.')


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
        prefix = next(iter(tensors), '').partition('.')[0] + '.'
        if prefix in ('backbone.', *_WRAPPERS) and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
            removed.append(prefix)
    for prefix in _WRAPPERS:
        outside = next((key for key in tensors if not key.startswith(prefix)), '')
        if any(key.startswith(prefix) for key in tensors):
            raise CheckpointError(
                f'{path} is not one network, it has {printable(outside)!r} beside keys that start with {prefix!r}: '
                'save the state_dict of one network.')
    if any(key.startswith('backbone.') for key in tensors):  # mmdetection, with the rest of the detector beside it
        left_out += sorted({f'{printable(key.partition(".")[0])}.*' for key in tensors} - {'backbone.*'})
        tensors = {k.removeprefix('backbone.'): v for k, v in tensors.items() if k.startswith('backbone.')}
        removed.append('backbone.')
    if len(left_out) > 9:
        left_out = [*left_out[:9], f'{len(left_out) - 9} more']
    prefixes = f'keys without {", ".join(map(repr, removed))}' if removed else ''
    return tensors, ', '.join(filter(None, (entry, prefixes))), tuple(left_out)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except Exception:  # a file may hold anything under this name
        return None


def _check_tensor(path: Path, key: str, value: Any) -> torch.Tensor:
    """A tensor as it is used: detached, float16 and bfloat16 widened. A CheckpointError if it can't be a weight."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.layout == torch.strided and value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
    problem = _find_problem(key.rpartition('.')[2], value)
    if problem:
        raise CheckpointError(
            f'{path}: {printable(key)!r} {problem}: save the weights of a trained network as dense float32 tensors.')
    return value


def _find_problem(name: str, value: Any) -> str | None:
    """Why a value can't be the tensor of a network, in words, or None. The name is the last part of its key."""
    if not isinstance(value, torch.Tensor):
        return f'is a {type(value).__name__} and not a tensor'
    if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
        return 'is a sparse, quantized or empty (meta) tensor'
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return 'is larger than its data'
    if name == 'num_batches_tracked':
        return None if value.dtype == torch.int64 and value.dim() == 0 else 'is not a count (one int64 number)'
    if name not in ('weight', 'bias', 'running_mean', 'running_var') and value.dtype in (torch.int64, torch.bool):
        return None  # indices and masks of other networks
    if value.dtype != torch.float32:
        return f'is of {value.dtype}, which is not converted silently'
    if not value.isfinite().all():
        return 'has NaN or Inf in it'
    if name == 'running_var' and value.lt(0).any():
        return 'has negative variances in it'
    return None
