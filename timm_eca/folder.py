"""Looks at a folder of weights before anything is built of it: its config, and its tensors' names and shapes.

A config names a model, its arguments and its preprocessing, and timm does what it says. What `save_for_hf`, `convert`
and `finetune` write passes; what leads elsewhere, or has timm build what the weights don't fill, is refused.
"""
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models import create_model, is_model
from torch.nn.modules.module import register_module_module_registration_hook

from timm_eca.archive import check_archive
from timm_eca.errors import TimmEcaError, first_line, show

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'REPORT_FILES', 'WEIGHTS_FILE', 'Description', 'FolderError', 'check_folder',
    'differing_tensors', 'read_description', 'read_shapes',
]

CARD_FILE = 'README.md'
WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'
PICKLE_FILE = 'pytorch_model.bin'  # what save_for_hf writes by default
REPORT_FILES = ('metrics.csv', 'curves.png', 'confusion_matrix.png')  # of a fine-tuning run

_CONFIG_BYTES = 2 ** 24  # ImageNet-22k's names and descriptions take 2 MB
_LARGEST = 4096  # of a model's arguments and an image's sides; timm's largest are 2048
_DTYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'U8', 'BOOL')
_MODULES = 10  # for each tensor, timm's models have up to 4

# Arguments of timm's factory that are no arguments of a model: they name other weights, files and devices.
_FACTORY = ('pretrained', 'checkpoint_path', 'cache_dir', 'device', 'dtype', 'model_cfg', 'kwargs_filter')


class FolderError(TimmEcaError, ValueError):
    """A folder whose files are not those of a model; says what is wrong, the cure is the caller's to name."""


class Description(NamedTuple):
    """What a folder says of its model."""
    architecture: str
    model_args: dict[str, Any]
    config: dict[str, Any]  # all of it


def check_folder(folder: Path) -> Description:
    """Checks a folder without reading its tensors: what it describes can be built, and has the tensors that it holds.

    Takes what building the model on torch's device `meta` does, tens of milliseconds, and no memory for weights.

    Raises:
        FolderError: It is not so, or a file is missing or damaged.
    """
    description = read_description(folder)
    shapes = read_shapes(folder)
    different = differing_tensors(folder, description.architecture, shapes)
    if different:
        raise FolderError(
            f'{folder / WEIGHTS_FILE} has not the tensors of {description.architecture} as {CONFIG_FILE} describes it '
            f'({len(different)} differ, {show(different[0])} the first)')
    return description


def read_description(folder: Path) -> Description:
    """Reads and checks `config.json`.

    Raises:
        FolderError: It is not the config of a model, or says what a config has no business to say.
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f'it has more than {_CONFIG_BYTES} bytes')
        config = json.loads(path.read_text(encoding='utf-8'), parse_constant=_refuse_constant)
        if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
            raise ValueError('it names no architecture')
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror or e if isinstance(e, OSError) else first_line(e, 200)
        raise FolderError(f'{path} is not the config of a model ({type(e).__name__}: {reason})') from None
    architecture = config['architecture']
    if not is_model(architecture):
        raise FolderError(f'{path} names the architecture {show(architecture)!r}, which timm doesn\'t know')

    model_args = config.get('model_args', {})
    if not isinstance(model_args, dict):
        raise FolderError(f'{path} has model_args that are none')
    for name, value in model_args.items():
        if name.startswith('pretrained_') or name in _FACTORY or not _ARGUMENTS.get(name, _is_argument)(value):
            raise FolderError(f'{path} has {show(name)} among its model_args as no model needs it')
    # One dict for both is timm's older form.
    preprocessing = config.get('pretrained_cfg', config)
    if not isinstance(preprocessing, dict):
        raise FolderError(f'{path} has a pretrained_cfg that is none')
    for name, value in {**preprocessing, **{k: config[k] for k in _TOP_LEVEL if k in config}}.items():
        if name in _FIELDS and (value is not None or name == 'num_classes') and not _FIELDS[name](value):
            raise FolderError(f'{path} has a value of {name} that can\'t be one')
    _check_together(path, {**preprocessing, 'in_chans': model_args.get('in_chans')})
    return Description(architecture, model_args, config)


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is no number in JSON')


def _is_integer(value: Any, least: int = 0, most: int = _LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Any) -> bool:
    return _is_integer(value, most=10 ** 7)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # no NaN is


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0.25 <= value <= 4


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10000


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are(check: Callable[[Any], bool], least: int = 0, most: int = _LARGEST) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(check, value))


def _is_argument(value: Any, depth: int = 4) -> bool:
    """Whether a model's argument is one that a model could have, and not one that only takes time or memory."""
    if isinstance(value, list | dict):
        values = value if isinstance(value, list) else [*value.values()]
        return depth > 0 and len(values) <= 256 and all(_is_argument(v, depth - 1) for v in values)
    return value is None or _is_flag(value) or _is_text(value) or _is_number(value)


def _any(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


def _are_texts(value: Any) -> bool:
    return all(map(_is_text, value if isinstance(value, list) else [None]))


def _map_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


_SIDE: Callable[[Any], bool] = lambda value: _is_integer(value, least=1)  # noqa: E731
_SIZE = _are(_SIDE, 3, 3)
_ARGUMENTS: Mapping[str, Callable[[Any], bool]] = {'num_classes': _is_count, 'in_chans': _SIDE}
_TOP_LEVEL = ('num_classes', 'label_names', 'label_descriptions')  # these go before those of the pretrained_cfg
# What timm and we read of a pretrained config, and what it can be; sources are set by timm when it reads a folder.
_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    'input_size': _SIZE, 'test_input_size': _SIZE, 'min_input_size': _SIZE, 'fixed_input_size': _is_flag,
    'pool_size': _any(_SIDE, _are(_SIDE, 2, 2)), 'test_pool_size': _any(_SIDE, _are(_SIDE, 2, 2)),
    'crop_pct': _is_share, 'test_crop_pct': _is_share,
    'crop_mode': _is_one_of('center', 'squash', 'border'),
    'interpolation': _is_one_of('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    'mean': _are(_is_number, 1), 'std': _are(_is_positive, 1),
    'num_classes': _is_count, 'label_offset': lambda value: _is_integer(value, most=0),
    'label_names': _any(_are_texts, _map_texts), 'label_descriptions': _any(_are_texts, _map_texts),
    'first_conv': _any(_is_text, _are_texts), 'classifier': _any(_is_text, _are_texts),
    'custom_load': lambda value: value is False,
    'state_dict': lambda value: False,
    'architecture': _is_text, 'tag': _is_text, 'license': _is_text, 'description': _is_text, 'origin_url': _is_text,
    'paper_name': _is_text, 'paper_ids': _any(_is_text, _are_texts), 'notes': _any(_is_text, _are_texts),
    'url': _any(_is_text, _are_texts), 'file': _is_text, 'source': _is_text, 'hf_hub_id': _is_text,
    'hf_hub_filename': _is_text,
}


def _check_together(path: Path, preprocessing: Mapping[str, Any]) -> None:
    channels = preprocessing['in_chans'] or (preprocessing.get('input_size') or [3])[0]
    for name in ('mean', 'std'):
        if len(preprocessing.get(name) or [0]) not in (1, channels):
            raise FolderError(f'{path} has not one {name} for each of {channels} input channels')


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a folder's weights, without reading the tensors.

    Raises:
        FolderError: There are no weights, or not a whole file of them.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / PICKLE_FILE).exists():
        return _read_pickled_shapes(folder / PICKLE_FILE)
    try:
        with safe_open(path, framework='pt') as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            for key, tensor in tensors.items():
                if tensor.get_dtype() not in _DTYPES:
                    raise FolderError(f'{path} has {show(key)!r} of type {tensor.get_dtype()}, as no model of timm')
            return {key: tuple(tensor.get_shape()) for key, tensor in tensors.items()}
    except (SafetensorError, OSError) as e:
        raise FolderError(f'{path} is not a whole safetensors file ({first_line(e, 200)})') from None


def _read_pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        check_archive(path)
        state_dict = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return {key: tuple(value.shape) for key, value in state_dict.items()}
    except Exception as e:  # whatever a damaged file makes torch stumble over
        raise FolderError(
            f'{path} is not a state dict that torch can read safely ({type(e).__name__}: {first_line(e, 200)})'
        ) from None


def differing_tensors(folder: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors that only the folder or only the model has, or that have other shapes in the two.

    Raises:
        FolderError: The model can't be built.
    """
    try:
        with _limit_modules(1000 + _MODULES * len(shapes)):
            model = create_model(f'local-dir:{folder}', device='meta')
    except Exception as e:  # timm's models raise whatever other people's arguments make them stumble over
        raise FolderError(
            f'{folder / CONFIG_FILE} describes no {architecture} ({type(e).__name__}: {first_line(e, 200)})'
        ) from None
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))


@contextmanager
def _limit_modules(most: int) -> Iterator[None]:
    """Ends the building of a model, by a RuntimeError, where it has more modules than these."""
    count, thread = 0, threading.get_ident()

    def check(module: nn.Module, name: str, submodule: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise RuntimeError(f'it has more than {most} modules')

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()
