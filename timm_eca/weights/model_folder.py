"""The folder of a model: config, weights and card. Checks such a folder before timm loads it.

Anybody can write such a folder. Its config may not name other weights, files or devices.
"""
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, is_model, load_state_dict
from timm.models._hub import save_config_for_hf  # the public save_for_hf writes the weights, too

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.weights.archive import check_archive
from timm_eca.weights.digests import digest, file_sha256, make_metadata, save_weights

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'REPORT_FILES', 'WEIGHTS_FILE', 'FolderError', 'check_folder', 'read_config',
    'weights_path', 'write_model',
]

CARD_FILE = 'README.md'
CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
PICKLE_FILE = 'pytorch_model.bin'  # the default of timm.models.save_for_hf
REPORT_FILES = ('metrics.csv', 'curves.png', 'confusion_matrix.png', 'confusions.csv')  # of a fine-tuning run

_RESERVED_ARGS = ('checkpoint_path', 'cache_dir', 'device', 'dtype', 'features_only')


class FolderError(TimmEcaError, ValueError):
    """A folder whose files are not those of a model. It names no fix: the caller knows what the folder is for."""


def check_folder(folder: Path, exact: bool = True) -> dict[str, Any]:
    """Checks that timm can build the model of a folder, and that the weights belong to the model. Loads no tensors.

    The model is built on torch's device `meta`, which takes milliseconds and no memory for weights.

    Args:
        folder: The folder.
        exact: Compare the names and shapes of the tensors. Without, timm may rename tensors when it loads them.

    Returns:
        The content of `config.json`.

    Raises:
        FolderError: The folder fails the check, or a file is missing or damaged.
    """
    path, weights = folder / CONFIG_FILE, weights_path(folder)
    config, shapes = read_config(path), _read_shapes(weights)
    architecture = config['architecture']
    with _reading(f'{path}: timm cannot build {architecture} from it'):
        model: Any = create_model(f'local-dir:{folder}', device='meta')
        cfg = model.pretrained_cfg
        create_transform(**resolve_data_config(pretrained_cfg=cfg))
    if not isinstance(cfg.get('label_names') or [], list | dict):
        raise FolderError(f'{path}: label_names must be a list')
    if model.num_classes != cfg.get('num_classes'):  # timm would load the rest, and keep a random classifier
        raise FolderError(
            f'{path}: the model has {model.num_classes} classes, its weights {printable(str(cfg.get("num_classes")))}')
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    different = sorted(
        key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key)
        and (key in shapes or not key.endswith('.num_batches_tracked')))  # torch takes 0 for a missing one
    if different and exact:
        raise FolderError(
            f'{weights} does not have the tensors of {architecture} as {CONFIG_FILE} describes it '
            f'({len(different)} differ, first {printable(different[0])})')
    return config


def weights_path(folder: Path) -> Path:
    """The weights file of a folder: safetensors, or a pickle if there is no safetensors file."""
    safe, pickled = folder / WEIGHTS_FILE, folder / PICKLE_FILE
    return pickled if os.path.exists(pickled) and not os.path.lexists(safe) else safe


def read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, and refuses what it may not set.

    Raises:
        FolderError: It is not the config of a model in timm's registry, or sets what it may not.
    """
    try:
        _check_regular(path)
        config = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
            raise ValueError('no architecture')
    except (OSError, ValueError, RecursionError) as e:
        raise FolderError(f'{path} is not the config of a model ({type(e).__name__}: {first_line(e, 200)})') from e
    if not is_model(config['architecture']):
        raise FolderError(f'{path}: timm has no model {printable(config["architecture"])!r}')
    model_args = config.get('model_args', {})
    pretrained_cfg = config.get('pretrained_cfg', config)  # older files have one dict for both
    if not isinstance(model_args, dict) or not isinstance(pretrained_cfg, dict):
        raise FolderError(f'{path}: invalid value for model_args or pretrained_cfg')
    for name in model_args:
        if name.startswith('pretrained') or name in _RESERVED_ARGS:
            raise FolderError(f'{path}: model_args may not set {printable(name)}')
    for name in ('state_dict', 'file'):
        if pretrained_cfg.get(name):
            raise FolderError(f'{path}: pretrained_cfg may not set {name}')
    return config


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a file."""
    if path.name == PICKLE_FILE:
        with _reading(f'{path} is not a state dict that can be read safely'):
            _check_regular(path)
            check_archive(path)
            tensors = load_state_dict(str(path), device='meta', weights_only=True)  # as timm reads it
            return {key: tuple(value.shape) for key, value in tensors.items()}
    with _reading(f'{path} is not a whole safetensors file'):
        _check_regular(path)
        with safe_open(path, framework='pt') as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """Turns any error into a FolderError: timm, torch and pickle raise every kind for values from outside."""
    try:
        yield
    except Exception as e:
        raise FolderError(f'{problem} ({type(e).__name__}: {first_line(e, 200)})') from e


def _check_regular(path: Path) -> None:
    """Raises an OSError for what is not a regular file. Reading a pipe or a device may never end."""
    if not path.is_file():
        raise OSError('no such file')


def write_model(folder: Path, network: nn.Module, source: Mapping[str, str], **settings: Any) -> dict[str, Any]:
    """Writes the config of a network and its weights, with digests of both. Returns the config.

    Args:
        folder: An existing folder.
        network: A timm model on a CPU.
        source: Where the weights are from, for the metadata of the weights file.
        **settings: Arguments of timm's `save_config_for_hf`.
    """
    save_config_for_hf(network, str(folder / CONFIG_FILE), **settings)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # transformers passes it itself
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    tensors = network.state_dict()
    digests = {key: digest(value) for key, value in tensors.items()}
    metadata = make_metadata(digests, config_sha256=file_sha256(folder / CONFIG_FILE), **source)
    save_weights(tensors, folder / WEIGHTS_FILE, metadata)
    return config
