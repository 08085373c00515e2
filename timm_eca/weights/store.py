"""Where pretrained weights come from: the weights directory of this machine, then the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `timm-eca convert` writes them: `config.json`,
`model.safetensors` and a card. For the authors' weights a third source comes last: `timm_eca.conversion.download`.
"""
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from timm.models import get_arch_pretrained_cfgs

from timm_eca.errors import TimmEcaError, first_line
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import PICKLE_FILE, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.official import OFFICIAL, TAG

__all__ = [
    'HUB_ERRORS', 'HUB_ORG', 'WeightsNotFoundError', 'check_cached', 'fetch_weights', 'find_local_weights', 'hub_id',
    'names_source', 'unknown_tag', 'unreadable_weights', 'weights_dir', 'weights_not_found',
]

HUB_ORG = 'timm-eca'  # organisation on the Hub with the converted weights, unless $TIMM_ECA_HUB_ORG names another
# What the Hub's client raises: for an answer of the Hub and, by the base class in httpx or httpx2, for no answer.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], EntryNotFoundError, HFValidationError, OfflineModeIsEnabled,
)


class WeightsNotFoundError(TimmEcaError, RuntimeError):
    """Pretrained weights were asked for that no source has."""


def hub_id(name: str) -> str:
    """The repository on the Hub of a `<model>.<tag>`."""
    return f'{os.environ.get("TIMM_ECA_HUB_ORG") or HUB_ORG}/{name}'


def weights_dir() -> Path:
    """The weights directory: `$TIMM_ECA_HOME`, else `timm_eca` in huggingface_hub's `HF_HOME`."""
    home = os.environ.get('TIMM_ECA_HOME')
    return Path(home).expanduser() if home else Path(constants.HF_HOME) / 'timm_eca'


def find_local_weights(name: str) -> Path | None:
    """The folder of a `<model>.<tag>` in the weights directory, or None if there is none.

    Raises:
        WeightsNotFoundError: The folder is damaged, or holds another model.
    """
    folder = weights_dir() / name
    if not folder.is_dir():
        return None
    try:
        architecture = check_folder(folder).architecture
        if architecture != name.partition('.')[0]:
            raise FolderError(f'it holds weights of {architecture}')
    except FolderError as e:
        raise unreadable_weights(folder, e) from None
    return folder


def fetch_weights(repo_id: str, cache_dir: str | Path | None = None, retry: bool = True) -> Path | None:
    """The weights of a repository in the Hub's cache, downloaded if they are not there, and checked.

    Args:
        repo_id: The repository.
        cache_dir: The Hub's cache, by default huggingface_hub's own.
        retry: Leave it to the client to ask again (it waits 23 seconds in all for a Hub that can't be reached).

    Returns:
        The file, or None if the repository has no safetensors.

    Raises:
        Exception: What the Hub's client raises; an OSError if the file is not the one that the Hub announced.
    """
    try:
        if not retry and not isinstance(try_to_load_from_cache(repo_id, WEIGHTS_FILE, cache_dir), str):
            get_hf_file_metadata(hf_hub_url(repo_id, WEIGHTS_FILE))  # a single request
        path = Path(hf_hub_download(repo_id, WEIGHTS_FILE, cache_dir=cache_dir))
    except EntryNotFoundError as e:
        pickled = try_to_load_from_cache(repo_id, PICKLE_FILE, cache_dir)
        if isinstance(e, LocalEntryNotFoundError) and not isinstance(pickled, str):
            raise
        return None
    check_cached(path)
    return path


def check_cached(path: Path) -> None:
    """Raises an OSError, and removes the file, if one in the Hub's cache is not what the Hub announced.

    huggingface_hub compares the length of a download only. Large files have their SHA-256 for a name in its cache.
    """
    blob = path.resolve()
    if re.fullmatch('[0-9a-f]{64}', blob.name):
        found = file_sha256(blob)
        if found != blob.name:
            with suppress(OSError):  # others may have removed it, or own it
                path.unlink()
                blob.unlink()
            raise OSError(f'what arrived of {path.name} has the SHA-256 {found}, not {blob.name}')


def names_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a pretrained config, or an overlay over one, names another source of weights than a repository."""
    return any(cfg.get(key) for key in ('source', 'file', 'url', 'state_dict'))


def unreadable_weights(folder: Path, reason: Exception) -> WeightsNotFoundError:
    """The error for a folder of the weights directory that can't be loaded."""
    return WeightsNotFoundError(
        f'{folder} can\'t be loaded ({reason}): remove it, or replace it with `timm-eca convert --force`.')


def unknown_tag(name: str, known: list[str]) -> WeightsNotFoundError:
    """The error for a tag that neither timm's registry nor the weights directory has."""
    return WeightsNotFoundError(
        f'Unknown weights {name}: there are {", ".join(known)}, and no folder {weights_dir() / name}.')


def weights_not_found(
        name: str,
        repo_id: str,
        reason: Exception | None,
        cached: Path | None = None,
        download: str | None = None,
) -> WeightsNotFoundError:
    """The error for weights that no source has: a line for each source, then a line for each thing to do.

    Args:
        name: The `<model>.<tag>`.
        repo_id: Its repository on the Hub.
        reason: What the Hub's client raised, or None if the repository has no safetensors.
        cached: The file in the Hub's cache, if it was loaded.
        download: Why the authors' file could not be downloaded, for weights that have one.
    """
    model, _, tag = name.partition('.')
    status = getattr(getattr(reason, 'response', None), 'status_code', None)
    if constants.HF_HUB_OFFLINE:
        why = 'not in the cache, and HF_HUB_OFFLINE is set'
    elif reason is None:
        why = f'no {WEIGHTS_FILE}'
    elif status in (401, 404):  # the Hub answers 401 for what is not there, unless there is a token
        why = 'no such public repository'
    else:
        cause = reason.__cause__ if isinstance(reason, LocalEntryNotFoundError) and reason.__cause__ else reason
        why = f'{type(cause).__name__}: {first_line(cause, 200)}'

    lines = [f'No weights for {name}:', f'  weights directory: no {weights_dir() / name}', f'  Hub, {repo_id}: {why}']
    if download is not None:
        lines.append(f'  Google Drive: {download}')
    lines.append('What you can do:')
    if cached is not None and isinstance(reason, SafetensorError):
        lines.append(f'  - remove {cached}, which is damaged, and try again')
    elif constants.HF_HUB_OFFLINE:
        lines.append('  - unset HF_HUB_OFFLINE')
    elif tag != TAG and status in (401, 403, 404):
        lines.append('  - log in with `hf auth login`, if the repository is private or gated')
    elif tag != TAG:
        lines.append('  - check the connection, and try again')
    if tag == TAG:
        official = OFFICIAL[model]
        plain = [key for key, cfg in get_arch_pretrained_cfgs(model).items() if cfg.tag != TAG and cfg.hf_hub_id]
        lines.append(f'  - to fine-tune, start from timm\'s own weights instead: {plain[0]}')
        lines.append(f'  - download {official.url} in a browser, then run `timm-eca convert {official.file}`')
    return WeightsNotFoundError('\n'.join(lines))
