"""The search for pretrained weights: in the weights directory, on the Hub, and on Google Drive."""
import os
from pathlib import Path

from huggingface_hub import constants
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from timm_eca.weights.model_folder import CONFIG_FILE, WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL, TAG
from timm_eca.weights.store import (
    HUB_ERRORS, WeightsNotFoundError, check_weights, explain_hub_error, fetch_files, find_local_weights, hub_id,
    weights_dir,
)

__all__ = ['default_weights', 'find_pretrained', 'no_weights']

_OFFLINE_FIXES = (
    'use a file of this machine: `timm-eca finetune --initial-checkpoint FILE`, `timm-eca predict --checkpoint FILE`, '
    'or in Python pretrained_cfg_overlay=dict(file=FILE)',
    'use no pretrained weights: `timm-eca finetune --no-pretrained`, or in Python pretrained=False',
)


def default_weights(model: str) -> str:
    """The `<model>.<tag>` of a model's default weights."""
    tag = get_pretrained_cfg(model, allow_unregistered=False).tag
    return f'{model}.{tag}' if tag else model


def find_pretrained(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Finds the weights of a registered model, and downloads them if this machine does not have them.

    The order is: the weights directory, the Hub, and for the authors' weights Google Drive, from where they go to the
    weights directory. `TIMM_ECA_DOWNLOAD=0` and `HF_HUB_OFFLINE` switch Google Drive off.

    Args:
        name: `<model>.<tag>`, or `<model>` for the default weights. timm's own models are allowed, too.
        cache_dir: The Hub's cache, if not the default one.

    Returns:
        A folder with a config and weights. None for weights that timm loads by itself, with the Hub's in the cache.

    Raises:
        WeightsNotFoundError: No source has the weights, or the folder is damaged.
    """
    model = name.partition('.')[0]
    name = default_weights(model) if name == model else name
    folder = find_local_weights(name)
    if folder is not None:
        return folder
    cfgs = get_arch_pretrained_cfgs(model)
    cfg = cfgs.get(name)
    if cfg is None:
        raise WeightsNotFoundError(
            f'There are no weights {name}', f'name one of {", ".join(cfgs)}',
            f'make the folder {weights_dir() / name} with `timm-eca convert --tag`')
    if not cfg.has_weights:
        raise WeightsNotFoundError(f'timm has no weights {name}', *_OFFLINE_FIXES)
    if cfg.tag != TAG:
        if (cfg.hf_hub_id or '').startswith('timm/'):  # the others may be pickles or URLs: timm loads them
            try:
                fetch_files(cfg.hf_hub_id, [WEIGHTS_FILE], cache_dir)
            except (*HUB_ERRORS, OSError) as e:  # type: ignore[misc]
                raise no_weights(name, e) from e
        return None
    try:
        folder = fetch_files(hub_id(name), [CONFIG_FILE, WEIGHTS_FILE], cache_dir)
    except (*HUB_ERRORS, OSError) as e:  # type: ignore[misc]
        return _fetch_from_drive(name, e)
    check_weights(folder, model)
    return folder


def _fetch_from_drive(name: str, hub_error: Exception) -> Path:
    if constants.HF_HUB_OFFLINE:
        raise no_weights(name, hub_error) from hub_error
    if os.environ.get('TIMM_ECA_DOWNLOAD') == '0':
        raise no_weights(name, hub_error, 'switched off by TIMM_ECA_DOWNLOAD=0') from hub_error
    # The import takes longer than all others of this package.
    from timm_eca.conversion.download import CheckpointError, DownloadError, convert_download
    try:
        return convert_download(name.partition('.')[0]).folder
    except DownloadError as e:
        raise no_weights(name, hub_error, e.reason) from e
    except CheckpointError as e:
        folder = find_local_weights(name)  # another process may have been faster
        if folder is None:
            raise WeightsNotFoundError(e.problem, *e.fixes) from e
        return folder


def no_weights(name: str, error: Exception, drive: str | None = None) -> WeightsNotFoundError:
    """The error for a `<model>.<tag>` that no source has.

    Args:
        name: The weights.
        error: Raised by the download from the Hub, or from the weights' URL.
        drive: Why Google Drive did not send the authors' file.
    """
    model = name.partition('.')[0]
    cfgs = get_arch_pretrained_cfgs(model)
    cfg = cfgs[name]
    official = OFFICIAL[model] if cfg.tag == TAG else None
    repo_id = hub_id(name) if official else cfg.hf_hub_id
    why, fixes = explain_hub_error(error)
    sources = [
        f'weights directory: no {weights_dir() / name}', f'{f"Hub, {repo_id}" if repo_id else cfg.url}: {why}']
    if drive:
        sources.append(f'Google Drive: {drive}')
    if official:
        plain = next(key for key, cfg in cfgs.items() if cfg.tag != TAG and cfg.hf_hub_id)
        fixes = (
            *fixes, f'start from timm\'s own weights if you fine-tune: {plain}',
            f'download {official.url} in a browser, then run `timm-eca convert {official.file}`')
    return WeightsNotFoundError(f'No weights for {name}', *fixes, *_OFFLINE_FIXES, sources=sources)
