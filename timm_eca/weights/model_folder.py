"""A folder of a model: its config, its weights and its card; and the check of a folder before timm builds the model.

The config of a folder can come from anybody. It may not lead timm to other weights, files or devices, and the weights
have to fill the model that it describes.
"""
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, is_model, load_state_dict

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.weights.archive import check_archive

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'REPORT_FILES', 'WEIGHTS_FILE', 'FolderError', 'check_folder', 'read_config',
    'weights_path',
]

CARD_FILE = 'README.md'
CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
PICKLE_FILE = 'pytorch_model.bin'  # what timm.models.save_for_hf writes unless told otherwise
REPORT_FILES = ('metrics.csv', 'curves.png', 'confusion_matrix.png')  # of a fine-tuning run

_RESERVED_ARGS = ('checkpoint_path', 'cache_dir', 'device', 'dtype', 'features_only')
_FACTOR, _CONSTANT = 4, 2 ** 26  # bytes of a model for those of its weights, which leave out some buffers


class FolderError(TimmEcaError, ValueError):
    """A folder whose files are not those of a model. The message says what is wrong; the caller adds the cure."""


def check_folder(folder: Path, exact: bool = True) -> dict[str, Any]:
    """Checks a folder without reading its tensors: timm can build the model, and the weights are the model's.

    The model is built on torch's device `meta`: that takes tens of milliseconds, and no memory for weights. Counts of
    batches (`num_batches_tracked`) may be missing: torch takes them for 0.

    Args:
        folder: The folder.
        exact: Require the names and shapes of the model's tensors. Otherwise timm may rename them when it loads them.

    Returns:
        The content of `config.json`.

    Raises:
        FolderError: The folder fails the check, or a file is missing or damaged.
    """
    path, weights = folder / CONFIG_FILE, weights_path(folder)
    config, shapes = read_config(path), _read_shapes(weights)
    architecture = config['architecture']
    try:
        model: Any = create_model(f'local-dir:{folder}', device='meta')
        cfg = model.pretrained_cfg
        data_config = resolve_data_config(pretrained_cfg=cfg)
        transform = create_transform(**data_config)
        mode = {1: 'L', 3: 'RGB'}.get(data_config['input_size'][0])
        if mode:  # whether images can be prepared like this is seen with one
            transform(Image.new(mode, (32, 32)))
        if not isinstance(cfg.get('label_names') or [], list | dict):
            raise TypeError('the names of the classes are no list')
    except Exception as e:  # timm raises many kinds of errors for values that it can't take
        raise FolderError(
            f'{path}: timm cannot build {architecture} from it ({type(e).__name__}: {first_line(e, 200)})') from None
    if model.num_classes != cfg.get('num_classes'):  # timm would leave the classifier at its random initial weights
        raise FolderError(
            f'{path}: the model has {model.num_classes} classes, its weights {printable(str(cfg.get("num_classes")))}')
    held = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    size = weights.stat().st_size
    if held > _FACTOR * size + _CONSTANT:
        raise FolderError(f'{path} describes a model of {held} bytes, but its weights have {size} bytes')
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    different = sorted(
        key for key in wanted.keys() | shapes.keys()
        if wanted.get(key) != shapes.get(key) and (key in shapes or not key.endswith('.num_batches_tracked')))
    if different and exact:
        raise FolderError(
            f'{weights} does not have the tensors of {architecture} as {CONFIG_FILE} describes it '
            f'({len(different)} differ, first {printable(different[0])})')
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Reads `config.json`, and checks what it may not set."""
    try:
        if not path.is_file():  # but e.g. a device that never ends
            raise OSError('no such file')
        config = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
            raise ValueError('no architecture')
    except (OSError, ValueError, RecursionError) as e:
        raise FolderError(f'{path} is not the config of a model ({type(e).__name__}: {first_line(e, 200)})') from None
    if not is_model(config['architecture']):
        raise FolderError(f'{path}: timm has no model {printable(config["architecture"])!r}')
    model_args = config.get('model_args', {})
    pretrained_cfg = config.get('pretrained_cfg', config)  # one dict for both is timm's older form
    if not isinstance(model_args, dict) or not isinstance(pretrained_cfg, dict):
        raise FolderError(f'{path}: invalid value for model_args or pretrained_cfg')
    for name in model_args:
        if name.startswith('pretrained') or name in _RESERVED_ARGS:
            raise FolderError(f'{path}: model_args may not set {printable(name)}')
    for name in ('state_dict', 'file'):
        if pretrained_cfg.get(name):
            raise FolderError(f'{path}: pretrained_cfg may not set {name}')
    return config


def weights_path(folder: Path) -> Path:
    """The file of a folder's weights: safetensors, or a pickle if only that is there."""
    safe, pickled = folder / WEIGHTS_FILE, folder / PICKLE_FILE
    return pickled if os.path.exists(pickled) and not os.path.lexists(safe) else safe


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a file, without reading the tensors."""
    try:
        if not path.is_file():
            raise OSError('no such file')
        if path.name == PICKLE_FILE:
            check_archive(path)
            tensors = load_state_dict(str(path), device='meta', weights_only=True)  # as timm reads them
            if sum(value.nbytes for value in tensors.values()) > 2 * path.stat().st_size:  # a few may share memory
                raise ValueError('it is smaller than its tensors')
            return {key: tuple(value.shape) for key, value in tensors.items()}
        with safe_open(path, framework='pt') as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as e:  # torch and safetensors raise several kinds of errors for a damaged file
        kind = 'state dict that can be read safely' if path.name == PICKLE_FILE else 'whole safetensors file'
        raise FolderError(f'{path} is not a {kind} ({type(e).__name__}: {first_line(e, 200)})') from None
