"""Reads the tensors of a checkpoint file, running no code from it."""
import os
import pickle
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.archive import ArchiveError, check_archive
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import regular_size

__all__ = ['Checkpoint', 'CheckpointError', 'read_checkpoint']

_LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # what torch.save wrote first before it wrote zip files


class CheckpointError(TimmEcaError, ValueError):
    """A checkpoint that can't be converted, or an output that can't be written; says what to do about it."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""
    state_dict: dict[str, torch.Tensor]  # by official keys, without `module.` or `backbone.`; float32
    sha256: str  # of the file
    left_out: tuple[str, ...]
    widened: tuple[str, ...]


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads the tensors of a checkpoint file, running no code from it.

    It may be of any form that `torch.save` has written: legacy or zip, with tensors on a GPU, a bare state dict or one
    below `state_dict`, with keys below `module.` (DataParallel) and `backbone.` (mmdetection). float16 and bfloat16
    tensors are widened to float32, which loses nothing; float64 is refused, since narrowing it would.

    Raises:
        CheckpointError: It is no such file, or holds something else than finite floating point tensors.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            regular_size(path)
        with path.open('rb') as file:
            _refuse_other_formats(path, file)
            sha256 = file_sha256(path)
            file.seek(0)
            content = _load(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        if os.path.isdir(path):
            raise CheckpointError(f'{path} is a directory: name the checkpoint file in it.') from None
        raise CheckpointError(f'{path} can\'t be read ({e.strerror or e}): name an existing checkpoint file.') from None

    tensors, left_out = _unwrap(path, content)
    del content  # the optimizer's state is as large as the weights
    state_dict, widened = {}, set()
    for key, value in tensors.items():
        state_dict[key] = _check_tensor(path, key, value)
        size -= value.nbytes
        if size < 0:  # separate copies of them would take memory without a bound
            raise CheckpointError(f'{path}: its tensors share memory, they are larger than the file: save copies.')
        if state_dict[key].dtype != value.dtype:
            widened.add(str(value.dtype).removeprefix('torch.'))
    return Checkpoint(state_dict, sha256, left_out, tuple(sorted(widened)))


def _refuse_other_formats(path: Path, file: IO[bytes]) -> None:
    head = file.read(512)
    again = 'download the checkpoint again'
    if not head:
        raise CheckpointError(f'{path} is empty: {again}.')
    if head.startswith(_LEGACY_MAGIC):
        return _check(path)
    if _LEGACY_MAGIC.startswith(head):
        raise CheckpointError(f'{path} is cut off after {len(head)} bytes: {again}.')
    if re.match(rb'\s*<(!doctype|html|\?xml|head|body)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint, as Google Drive sends one in place of a file when it asks for a '
            f'confirmation or its quota is used up: {again}, e.g. in a browser.')
    if head.startswith(b'PK\x03\x04'):
        return _check(path)
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive. The authors\' .pth.tar files are none, in spite of their name: name the '
            'checkpoint as it was downloaded, or unpack this archive and name the checkpoint in it.')
    raise CheckpointError(f'{path} is not a file that torch.save wrote: name one of the authors\' .pth.tar files.')


def _check(path: Path) -> None:
    try:
        check_archive(path)
    except ArchiveError as e:
        cure = 'download the checkpoint again' if 'damaged' in str(e) else 'name a checkpoint as torch.save wrote it'
        raise CheckpointError(f'{path} is {e}: {cure}.') from None


def _load(path: Path, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = re.search(r'GLOBAL (\S+)', str(e))
        if unsafe:
            raise CheckpointError(
                f'{path} holds more than tensors and plain values: loading it would run {printable(unsafe[1])}, so it was '
                'refused. If you trust its source, save its state_dict alone, where it was made, and convert that.'
            ) from None
        error: Exception = e
    except Exception as e:  # whatever a damaged file makes the reader stumble over
        error = e
    raise CheckpointError(
        f'{path} is cut off or damaged after its beginning (it has {path.stat().st_size} bytes; '
        f'{type(error).__name__}): download the checkpoint again.'
    ) from None


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors of a checkpoint without the prefixes of their keys, and the names of what else it holds."""
    wrapped = isinstance(content, Mapping) and isinstance(content.get('state_dict'), Mapping)
    state_dict = content['state_dict'] if wrapped else content
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f'{path} holds a {type(content).__name__}, not a state dict: save model.state_dict() and convert that.')
    if not state_dict:
        raise CheckpointError(f'{path} holds an empty state dict: name a checkpoint with weights.')
    for key in state_dict:  # names are shown as they are from here on
        if not isinstance(key, str):
            raise CheckpointError(
                f'{path} has a key that is no string ({type(key).__name__}) where tensors are named: it is not a '
                'state dict, save model.state_dict() and convert that.')
    left_out = [printable(str(key)) for key in content if key != 'state_dict'] if wrapped else []

    if any(key.startswith('module.') for key in state_dict):  # DataParallel
        stranger = next((key for key in state_dict if not key.startswith('module.')), None)
        if stranger is not None:
            raise CheckpointError(
                f'{path} has {printable(stranger)!r} beside keys that start with \'module.\': it is not one network, save '
                'the state_dict of one and convert that.')
        state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if any(key.startswith('backbone.') for key in state_dict):  # mmdetection, with the rest of the detector beside it
        others = {key.partition('.')[0] for key in state_dict} - {'backbone'}
        left_out += [f'{printable(other)}.*' for other in sorted(others)]
        state_dict = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
    if len(left_out) > 9:
        left_out = [*left_out[:9], f'{len(left_out) - 9} more']
    return dict(state_dict), tuple(left_out)


def _check_tensor(path: Path, key: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f'{path}: {printable(key)!r} is a {type(value).__name__} and no tensor: save model.state_dict(), convert that.')
    value = value.detach()
    if key.endswith('.num_batches_tracked'):
        dense = value.layout == torch.strided and value.device.type == 'cpu'
        if dense and value.dtype == torch.int64 and value.dim() == 0:
            return value
        raise CheckpointError(f'{path}: {printable(key)!r} is not a count (one int64 number): convert an undamaged copy.')
    if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
        raise CheckpointError(
            f'{path}: {printable(key)!r} is a sparse, quantized or empty (meta) tensor: save the weights as dense float32 '
            'tensors.')
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f'{path}: {printable(key)!r} is larger than its data: save the weights as dense tensors.')
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if value.dtype != torch.float32:
        raise CheckpointError(
            f'{path}: {printable(key)!r} is of {value.dtype}: save the weights as float32 (float16 and bfloat16 are '
            'widened, float64 is not narrowed silently).')
    if not value.isfinite().all():
        raise CheckpointError(f'{path}: {printable(key)!r} has NaN or Inf in it: convert an undamaged copy.')
    if key.endswith('.running_var') and value.lt(0).any():
        raise CheckpointError(f'{path}: {printable(key)!r} has negative variances in it: convert an undamaged copy.')
    return value
