"""Looks at a folder of weights before anything is built of it: its config, and its tensors' names and shapes.

What has timm build much more than the weights fill is refused.
"""
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models import create_model
from torch.nn.modules.module import register_module_module_registration_hook

from timm_eca.errors import first_line, printable
from timm_eca.weights.archive import load_pickled
from timm_eca.weights.folder_config import CONFIG_FILE as CONFIG_FILE
from timm_eca.weights.folder_config import Description, FolderError, read_description
from timm_eca.weights.folder_config import regular_size as regular_size

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'PICKLE_FILE', 'REPORT_FILES', 'WEIGHTS_FILE', 'Description', 'FolderError',
    'check_folder', 'differing_tensors', 'read_description', 'read_shapes', 'regular_size',
    'weights_path',
]

CARD_FILE = 'README.md'
WEIGHTS_FILE = 'model.safetensors'
PICKLE_FILE = 'pytorch_model.bin'  # what save_for_hf writes by default
REPORT_FILES = ('metrics.csv', 'curves.png', 'confusion_matrix.png')  # of a fine-tuning run

_DTYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'U8', 'BOOL')
_MODULES = 10  # for each tensor, timm's models have up to 4
_ALL_MODULES = 30000
_SECONDS = 15  # to build a model without weights, timm's take one
_FACTOR, _CONSTANT = 4, 2 ** 26  # bytes of a model for those of its weights, which leave out what isn't trained


def check_folder(folder: Path, exact: bool = True) -> Description:
    """Checks a folder without reading its tensors: what it describes can be built, and is filled by its weights.

    Takes what building the model on torch's device `meta` does, tens of milliseconds, and no memory for weights.

    Args:
        folder: The folder.
        exact: The names and shapes of the tensors have to be the model's. Otherwise they may be such as timm renames
            when it loads them.

    Raises:
        FolderError: It is not so, or a file is missing or damaged.
    """
    description = read_description(folder)
    shapes = read_shapes(folder)
    different = differing_tensors(folder, description.architecture, shapes)
    if different and exact:
        raise FolderError(
            f'{weights_path(folder)} has not the tensors of {description.architecture} as {CONFIG_FILE} describes it '
            f'({len(different)} differ, {printable(different[0])} the first)')
    return description


def weights_path(folder: Path) -> Path:
    """The file of a folder's weights: safetensors, or a pickle where that alone is there."""
    safe = folder / WEIGHTS_FILE
    return folder / PICKLE_FILE if not os.path.lexists(safe) and os.path.lexists(folder / PICKLE_FILE) else safe


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a folder's weights, without reading the tensors.

    Raises:
        FolderError: There are no weights, or not a whole file of them.
    """
    path = weights_path(folder)
    if path.name == PICKLE_FILE:
        return _read_pickled_shapes(path)
    try:
        regular_size(path)
        with safe_open(path, framework='pt') as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            for key, tensor in tensors.items():
                if tensor.get_dtype() not in _DTYPES:
                    raise FolderError(f'{path} has {printable(key)!r} of type {tensor.get_dtype()}, as no model of timm')
            return {key: tuple(tensor.get_shape()) for key, tensor in tensors.items()}
    except (SafetensorError, OSError) as e:
        reason = getattr(e, 'strerror', None) or first_line(e, 200)
        raise FolderError(f'{path} is not a whole safetensors file ({reason})') from None


def _read_pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        regular_size(path)
        return {key: tuple(value.shape) for key, value in load_pickled(path).items()}
    except Exception as e:  # whatever a damaged file makes torch stumble over
        raise FolderError(
            f'{path} is not a state dict that torch can read safely ({type(e).__name__}: {first_line(e, 200)})'
        ) from None


def differing_tensors(folder: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors that only the folder or only the model has, or that have other shapes in the two.

    Counts of batches may be missing: torch takes them for 0.

    Raises:
        FolderError: The model can't be built, or is much larger than its weights.
    """
    path = folder / CONFIG_FILE
    try:
        with _limited_time(), _limited_modules(min(1000 + _MODULES * len(shapes), _ALL_MODULES)):
            model: Any = create_model(f'local-dir:{folder}', device='meta')
        classes, wanted_classes = model.num_classes, model.pretrained_cfg.get('num_classes')
    except Exception as e:  # timm's models raise whatever other people's arguments make them stumble over
        raise FolderError(
            f'{path} describes no {architecture} ({type(e).__name__}: {first_line(e, 200)})') from None
    if classes != wanted_classes:  # timm would leave the classifier as it was made, at random
        raise FolderError(f'{path} describes no {architecture}: it has {wanted_classes} classes and {classes}')
    held = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    size = weights_path(folder).stat().st_size
    if held > _FACTOR * size + _CONSTANT:
        raise FolderError(
            f'{path} describes a model of {held} bytes, which its weights, {size} bytes, don\'t fill')
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    offset, classifiers = model.pretrained_cfg.get('label_offset'), model.pretrained_cfg.get('classifier') or ()
    for classifier in ([classifiers] if isinstance(classifiers, str) else classifiers) if offset else ():
        for key in (f'{classifier}.weight', f'{classifier}.bias'):  # with classes that timm leaves out
            if key in wanted:
                wanted[key] = (wanted[key][0] + offset, *wanted[key][1:])
    return sorted(
        key for key in wanted.keys() | shapes.keys()
        if wanted.get(key) != shapes.get(key) and (key in shapes or not key.endswith('.num_batches_tracked')))


@contextmanager
def _limited_time() -> Iterator[None]:
    """Ends the building of a model, by a TimeoutError, where it takes long: in the main thread, as commands do it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, 'SIGALRM') or (
            signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL):  # somebody else's alarm
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f'it takes more than {_SECONDS} seconds to build')

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


class _Limit(threading.local):
    """How many modules this thread may still add to others."""
    left = math.inf


_limit = _Limit()


@cache  # once, and for good: other threads go through torch's list of hooks while they build their models
def _watch_modules() -> None:
    def check(module: nn.Module, name: str, submodule: Any) -> None:
        _limit.left -= 1
        if _limit.left < 0:
            raise RuntimeError('it has too many modules')

    register_module_module_registration_hook(check)


@contextmanager
def _limited_modules(most: int) -> Iterator[None]:
    """Ends the building of a model, by a RuntimeError, where it has more modules than these."""
    _watch_modules()
    _limit.left = most
    try:
        yield
    finally:
        _limit.left = math.inf
