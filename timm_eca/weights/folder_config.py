"""What the `config.json` of a folder may say.

It names a model, its arguments and its preprocessing, and timm does what it says. What `save_for_hf`, `convert` and
`finetune` write passes; what leads elsewhere, or only takes time and memory, is refused.
"""
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import is_model

from timm_eca.errors import TimmEcaError, first_line, printable

__all__ = ['CONFIG_FILE', 'Description', 'FolderError', 'read_description', 'regular_size']

CONFIG_FILE = 'config.json'

_BYTES = 2 ** 24  # ImageNet-22k's names and descriptions take 2 MB
_LARGEST = 4096  # of a model's arguments; timm's largest are 2816
_LARGEST_IMAGE = 2048  # pixels of a side; timm's largest is 1024

# Arguments of timm's factory that name other weights, files and devices, or wrap the model.
_FACTORY = (
    'pretrained', 'checkpoint_path', 'cache_dir', 'device', 'dtype', 'model_cfg', 'kwargs_filter', 'features_only',
    'feature_cfg', 'feature_cls', 'out_indices')


class FolderError(TimmEcaError, ValueError):
    """A folder whose files are not those of a model; says what is wrong, the cure is the caller's to name."""


class Description(NamedTuple):
    """What a folder says of its model."""
    architecture: str
    model_args: dict[str, Any]
    config: dict[str, Any]  # all of it


def regular_size(path: Path) -> int:
    """The size of a file, or an OSError for what is none, such as a device that never ends."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError('it is no regular file')
    return status.st_size


def read_description(folder: Path) -> Description:
    """Reads and checks `config.json`.

    Raises:
        FolderError: It is not the config of a model, or says what a config has no business to say.
    """
    path = folder / CONFIG_FILE
    try:
        if regular_size(path) > _BYTES:
            raise ValueError(f'it has more than {_BYTES} bytes')
        config = json.loads(path.read_text(encoding='utf-8'), parse_constant=_refuse_constant)
        if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
            raise ValueError('it names no architecture')
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, 'strerror', None) or first_line(e, 200)
        raise FolderError(f'{path} is not the config of a model ({type(e).__name__}: {reason})') from None
    architecture = config['architecture']
    if not is_model(architecture):
        raise FolderError(f'{path} names the architecture {printable(architecture)!r}, which timm doesn\'t know')

    model_args = config.get('model_args', {})
    if not isinstance(model_args, dict):
        raise FolderError(f'{path} has model_args that are none')
    for name, value in model_args.items():
        if name.startswith('pretrained_') or name in _FACTORY or not _ARGUMENTS.get(name, _is_argument)(value):
            raise FolderError(f'{path} has {printable(name)} among its model_args as no model needs it')
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
    return _is_number(value) and 0.01 <= value <= 100


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2 ** 17 and value.encode(errors='ignore').decode() == value


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
    """Texts, numbers or nothing, in a list or as the values of a dict."""
    texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [[]]
    return all(text is None or _is_text(text) or _is_count(text) for text in texts)


def _is_one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _is_side(value: Any) -> bool:
    return _is_integer(value, least=1)


def _is_image_size(value: Any) -> bool:
    return _are(_is_side, 3, 3)(value) and max(value[1:]) <= _LARGEST_IMAGE


_ARGUMENTS: Mapping[str, Callable[[Any], bool]] = {'num_classes': _is_count, 'in_chans': _is_side}
_TOP_LEVEL = ('num_classes', 'label_names', 'label_descriptions')  # these go before those of the pretrained_cfg
# What timm and we read of a pretrained config, and what it can be; sources are set by timm when it reads a folder.
_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    'input_size': _is_image_size, 'test_input_size': _is_image_size, 'min_input_size': _is_image_size,
    'fixed_input_size': _is_flag,
    'pool_size': _any(_is_side, _are(_is_side, 2, 2)), 'test_pool_size': _any(_is_side, _are(_is_side, 2, 2)),
    'crop_pct': _is_share, 'test_crop_pct': _is_share,
    'crop_mode': _is_one_of('center', 'squash', 'border'),
    'interpolation': _is_one_of('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random'),
    'mean': _are(_is_number, 1), 'std': _are(_is_positive, 1),
    'num_classes': _is_count, 'label_offset': lambda value: _is_integer(value, most=1),
    'label_names': _are_texts, 'label_descriptions': _are_texts, 'labels': _are_texts,
    'first_conv': _any(_is_text, _are_texts), 'classifier': _any(_is_text, _are_texts),
    'custom_load': _any(_is_flag, _is_text),
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
    for prefix in ('', 'test_'):  # images are scaled to what the crop is taken of
        size, share = preprocessing.get(f'{prefix}input_size'), preprocessing.get(f'{prefix}crop_pct')
        if size and share and max(size[1:]) / share > 2 * _LARGEST_IMAGE:
            raise FolderError(f'{path} has a value of {prefix}crop_pct that can\'t be one')
