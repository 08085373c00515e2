"""A folder of a model: its config, its weights and its card; and the check of a folder before timm builds the model.

The config of a folder can come from anybody. It may not lead timm to other weights, files or devices, and the weights
have to fill the model that it describes.
"""
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from timm.models import create_model, is_model

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.weights.archive import load_pickled

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'PICKLE_FILE', 'REPORT_FILES', 'WEIGHTS_FILE', 'Description',
    'FolderError', 'check_folder', 'check_regular_file', 'differing_tensors', 'read_description', 'read_shapes',
    'weights_path',
]

CARD_FILE = 'README.md'
CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
PICKLE_FILE = 'pytorch_model.bin'  # what save_for_hf writes by default
REPORT_FILES = ('metrics.csv', 'curves.png', 'confusion_matrix.png')  # of a fine-tuning run

_MAX_CONFIG_BYTES = 2 ** 24  # ImageNet-22k's names and descriptions take 2 MB
_RESERVED_ARGS = ('checkpoint_path', 'cache_dir', 'device', 'dtype', 'features_only')
_DTYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'U8', 'BOOL')  # safetensors' names
_FACTOR, _CONSTANT = 4, 2 ** 26  # bytes of a model for those of its weights, which leave out some buffers


class FolderError(TimmEcaError, ValueError):
    """A folder whose files are not those of a model. The message says what is wrong; the caller adds the cure."""


class Description(NamedTuple):
    """The checked content of `config.json`."""
    architecture: str
    model_args: dict[str, Any]
    config: dict[str, Any]  # all of it


def check_folder(folder: Path, exact: bool = True) -> Description:
    """Checks a folder without reading its tensors: timm can build the model, and the weights are the model's.

    The model is built on torch's device `meta`: that takes tens of milliseconds, and no memory for weights.

    Args:
        folder: The folder.
        exact: Require the names and shapes of the model's tensors. Otherwise timm may rename them when it loads them.

    Raises:
        FolderError: The folder fails the check, or a file is missing or damaged.
    """
    description = read_description(folder)
    different = differing_tensors(folder, description.architecture, read_shapes(folder))
    if different and exact:
        raise FolderError(
            f'{weights_path(folder)} does not have the tensors of {description.architecture} as {CONFIG_FILE} '
            f'describes it ({len(different)} differ, first {printable(different[0])})')
    return description


def weights_path(folder: Path) -> Path:
    """The file of a folder's weights: safetensors, or a pickle if only that is there."""
    safe = folder / WEIGHTS_FILE
    return folder / PICKLE_FILE if not os.path.lexists(safe) and os.path.lexists(folder / PICKLE_FILE) else safe


def check_regular_file(path: Path, max_bytes: float = math.inf) -> None:
    """Raises an OSError for a missing or too large file, and for other things, such as a device that never ends."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError('not a regular file')
    if status.st_size > max_bytes:
        raise OSError(f'more than {max_bytes} bytes')


def read_description(folder: Path) -> Description:
    """Reads and checks `config.json`.

    Raises:
        FolderError: It is not the config of a model, or sets what a config may not set.
    """
    path = folder / CONFIG_FILE
    try:
        check_regular_file(path, _MAX_CONFIG_BYTES)
        config = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
            raise ValueError('no architecture')
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, 'strerror', None) or first_line(e, 200)
        raise FolderError(f'{path} is not the config of a model ({type(e).__name__}: {reason})') from None
    architecture = config['architecture']
    if not is_model(architecture):
        raise FolderError(f'{path}: timm has no model {printable(architecture)!r}')
    model_args = config.get('model_args', {})
    pretrained_cfg = config.get('pretrained_cfg', config)  # one dict for both is timm's older form
    for name, value in (('model_args', model_args), ('pretrained_cfg', pretrained_cfg)):
        if not isinstance(value, dict):
            raise FolderError(f'{path}: invalid value for {name}')
    for name in model_args:
        if name.startswith('pretrained') or name in _RESERVED_ARGS:
            raise FolderError(f'{path}: model_args may not set {printable(name)}')
    for name in ('state_dict', 'file'):
        if pretrained_cfg.get(name):
            raise FolderError(f'{path}: pretrained_cfg may not set {name}')
    for name, value in [*pretrained_cfg.items(), *config.items()]:
        if value is not None and not _is_valid(name, value):
            raise FolderError(f'{path}: invalid value for {name}')
    return Description(architecture, model_args, config)


def _is_valid(name: str, value: Any) -> bool:
    """Whether timm can read an entry of `pretrained_cfg` while it loads weights and prepares images."""
    if name in ('num_classes', 'label_offset'):
        return type(value) is int and 0 <= value < 2 ** 31
    if name in ('input_size', 'mean', 'std'):
        return isinstance(value, list) and all(_is_number(v, name != 'mean') for v in value) and (
            len(value) == 3 if name == 'input_size' else len(value) > 0)
    if name in ('classifier', 'first_conv'):
        return all(isinstance(module, str) for module in (value if isinstance(value, list) else [value]))
    if name in ('label_names', 'labels'):
        return isinstance(value, list | dict)
    return name != 'crop_pct' or _is_number(value, positive=True)


def _is_number(value: Any, positive: bool) -> bool:
    return type(value) in (int, float) and (value > 0 or not positive) and abs(value) < 2 ** 31  # NaN is not


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a folder's weights, without reading the tensors.

    Raises:
        FolderError: There are no weights, or the file is damaged.
    """
    path = weights_path(folder)
    try:
        check_regular_file(path)
        if path.name == PICKLE_FILE:
            return {key: tuple(value.shape) for key, value in load_pickled(path).items()}
        with safe_open(path, framework='pt') as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            types = {key: tensor.get_dtype() for key, tensor in tensors.items()}
            shapes = {key: tuple(tensor.get_shape()) for key, tensor in tensors.items()}
    except Exception as e:  # torch raises many kinds of errors for a damaged file
        kind = 'state dict that torch can read safely' if path.name == PICKLE_FILE else 'whole safetensors file'
        reason = getattr(e, 'strerror', None) or first_line(e, 200)
        raise FolderError(f'{path} is not a {kind} ({type(e).__name__}: {reason})') from None
    for key, dtype in types.items():
        if dtype not in _DTYPES:
            raise FolderError(f'{path}: {printable(key)!r} is of type {dtype}, which no model of timm has')
    return shapes


def differing_tensors(folder: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors that only the folder or only the model has, or that have other shapes in the two.

    Counts of batches (`num_batches_tracked`) may be missing: torch takes them for 0.

    Raises:
        FolderError: timm can't build the model, or the model is much larger than its weights.
    """
    path = folder / CONFIG_FILE
    try:
        model: Any = create_model(f'local-dir:{folder}', device='meta')
        cfg, num_classes = model.pretrained_cfg, model.num_classes
    except Exception as e:  # timm's models raise many kinds of errors for arguments that they can't take
        raise FolderError(
            f'{path}: timm cannot build {architecture} from it ({type(e).__name__}: {first_line(e, 200)})') from None
    if num_classes != cfg.get('num_classes'):  # timm would leave the classifier at its random initial weights
        raise FolderError(f'{path}: the model has {num_classes} classes, its weights {cfg.get("num_classes")}')
    held = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    size = weights_path(folder).stat().st_size
    if held > _FACTOR * size + _CONSTANT:
        raise FolderError(f'{path} describes a model of {held} bytes, but its weights have {size} bytes')
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return sorted(
        key for key in wanted.keys() | shapes.keys()
        if wanted.get(key) != shapes.get(key) and (key in shapes or not key.endswith('.num_batches_tracked')))
