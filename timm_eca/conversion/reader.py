"""Reads the tensors of a checkpoint file, running no code from it."""
import argparse
import os
import pickle
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
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
_TORCH_HEADS = (b'PK\x03\x04', b'\x80\x02\x8a\x0al\xfc\x9cF\xf9')  # zip, and the magic number of the older format
_lock = threading.Lock()  # safe_globals changes one list for all threads


class CheckpointError(TimmEcaError, ValueError):
    """A checkpoint that can't be read or converted, or an output that can't be written."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""
    path: Path
    state_dict: dict[str, torch.Tensor]  # floating point tensors are float32; without the prefixes of wrappers
    sha256: str  # of the file
    part: str  # the entry that was read and the prefixes that were removed, in words; may be empty
    left_out: tuple[str, ...]  # the rest of the file
    best_prec1: float | None  # top-1 accuracy in percent that the file claims


def read_checkpoint(path: str | os.PathLike, use_ema: bool = True) -> Checkpoint:
    """Reads the tensors of a checkpoint file, running no code from it.

    Reads both formats of `torch.save`, and safetensors. The state dict may be the whole file or an entry of it, and
    its keys may have the prefixes of wrappers (DataParallel, `torch.compile`, Lightning, mmdetection). Tensors outside
    of the wrapped network are left out. float16 and bfloat16 become float32, which loses nothing.

    Args:
        path: The file.
        use_ema: Prefer the averaged weights (EMA) if the file has both.

    Raises:
        CheckpointError: The file is of another kind, is damaged, or has tensors that can't be weights: not finite, or
            of other types than float32, float16, bfloat16, int64 and bool.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device may never end
        raise CheckpointError(f'{path} is not a file', 'name the file itself, not a folder of its content')
    try:
        with path.open('rb') as file:
            sha256 = file_sha256(path)
            room = os.fstat(file.fileno()).st_size
            content = _load(path, file)
    except OSError as e:
        raise CheckpointError(
            f'{path} can\'t be read ({e.strerror or e})', 'name an existing checkpoint file') from e

    tensors, part, left_out = _unwrap(path, content, use_ema)
    try:
        best_prec1 = float(content.get('best_prec1'))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # None, or not one number
        best_prec1 = None
    del content  # the optimizer's state is as large as the weights
    state_dict = {}
    for key, value in tensors.items():
        problem = _problem(key, value, room)
        if problem:
            raise CheckpointError(
                f'{path}: {printable(key)!r} {problem}',
                'save the weights of a trained network as dense float32 tensors')
        room -= value.nbytes
        state_dict[key] = value.detach().float() if value.is_floating_point() else value
    return Checkpoint(path, state_dict, sha256, part, left_out, best_prec1)


def _load(path: Path, file: IO[bytes]) -> Any:
    head = file.read(512)
    file.seek(0)
    if re.match(rb'\s*<(!doctype|html|\?xml|head|body)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint. Google Drive sends one to ask for a confirmation, or if its '
            'quota is used up', 'download the checkpoint again in a browser')
    # Classes that may stand beside weights: the options of timm's train.py, and accuracies as numpy's numbers.
    scalar = np.float64().__reduce__()[0]
    classes: list[Any] = [
        argparse.Namespace, np.dtype, (scalar, 'numpy.core.multiarray.scalar'),
        (scalar, 'numpy._core.multiarray.scalar'), *(type(np.dtype(name)) for name in ('f4', 'f8', 'i4', 'i8'))]
    try:
        if head[8:9] == b'{':
            return load_file(path)
        check_archive(path)
        with _lock, torch.serialization.safe_globals(classes):
            return torch.load(file, map_location='cpu', weights_only=True)
    except ArchiveError as e:
        raise CheckpointError(f'{path} is {e}', 'name the file that torch.save wrote') from e
    except Exception as e:  # torch raises errors of many kinds for a damaged file
        if isinstance(e, pickle.UnpicklingError) and head.startswith(_TORCH_HEADS):
            raise CheckpointError(
                f'{path} holds more than tensors and plain values, or is damaged. Loading it could run code, so it was '
                'refused', 'save only the state_dict where the file was made') from e
        raise CheckpointError(
            f'{path} is cut off or damaged, or not of torch.save or safetensors ({type(e).__name__})',
            'download it again, or name a checkpoint') from e


def _unwrap(path: Path, content: Any, use_ema: bool) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The tensors by names without prefixes; the part of the file that they are; and the rest of the file."""
    entry, state_dict = None, content
    if isinstance(content, Mapping):
        entries = (*_EMA_KEYS, *_STATE_DICT_KEYS) if use_ema else (*_STATE_DICT_KEYS, *_EMA_KEYS)
        found = [key for key in entries if isinstance(content.get(key), Mapping)]
        if found:
            entry = next(filter(content.get, found), found[0])  # an EMA that is not used may be empty
            state_dict = content[entry]
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError(f'{path} is not a state dict, which has tensors by name', 'save model.state_dict()')
    if not state_dict:
        raise CheckpointError(f'{path} holds an empty state dict', 'name a checkpoint with weights')
    left_out = [] if entry is None else [printable(str(key)) for key in content if key != entry]
    left_out += sorted({key.rpartition('.')[2] for key in state_dict}.intersection(_COUNTERS))
    tensors = {key: value for key, value in state_dict.items() if key.rpartition('.')[2] not in _COUNTERS}

    removed: list[str] = []
    if any('_orig_mod.' in key for key in tensors):  # torch.compile, of the whole or of parts
        tensors, removed = {key.replace('_orig_mod.', ''): value for key, value in tensors.items()}, ['_orig_mod.']
    for _ in range(8):  # wrappers within wrappers
        # Only a network has convolutions: `model.temperature` beside a network is no wrapper of it.
        convs = [key for key, value in tensors.items() if isinstance(value, torch.Tensor) and value.dim() == 4]
        prefix = max(_WRAPPERS, key=lambda prefix: sum(key.startswith(prefix) for key in convs))
        if not any(key.startswith(prefix) for key in convs):
            break
        left_out += sorted({f'{printable(key.partition(".")[0])}.*' for key in tensors} - {f'{prefix}*'})
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        removed.append(prefix)
    prefixes = f'keys without {", ".join(map(repr, removed))}' if removed else ''
    return tensors, ', '.join(filter(None, (entry, prefixes))), tuple(left_out)


def _problem(key: str, value: Any, room: int) -> str:
    """Why a value can't be a weight, or '' if it can. `room` is the bytes of the file that no earlier tensor fills."""
    if not isinstance(value, torch.Tensor):
        return f'is a {type(value).__name__} and not a tensor'
    if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
        return 'is a sparse, quantized or empty (meta) tensor'
    if value.nbytes > room:  # copies of tensors that share memory would take it without a bound
        return 'needs more bytes than the file has: the data is missing or shared with another tensor'
    if key.endswith('num_batches_tracked') and value.dtype != torch.int64:
        return f'is of {value.dtype} and no count'
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        return f'is of {value.dtype}; only float32, float16 and bfloat16 are converted'
    return '' if value.isfinite().all() else 'has NaN or Inf in it'
