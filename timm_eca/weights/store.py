"""Where pretrained weights come from: the weights directory of this machine, then the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `timm-eca convert` writes them: `config.json`,
`model.safetensors` and a card. For the authors' weights a third source comes last: `timm_eca.conversion.download`.
"""
import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled,
)
from timm.models import get_arch_pretrained_cfgs

from timm_eca.errors import TimmEcaError, first_line
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.official import OFFICIAL, TAG

__all__ = [
    'HUB_ERRORS', 'HUB_ORG', 'WeightsNotFoundError', 'check_cached', 'fetch_weights', 'find_local_weights', 'hub_id',
    'unreadable_weights', 'weights_dir', 'weights_not_found',
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
        architecture = check_folder(folder)['architecture']
        if architecture != name.partition('.')[0]:
            raise FolderError(f'it holds weights of {architecture}')
    except FolderError as e:
        raise unreadable_weights(folder, e) from None
    return folder


def unreadable_weights(folder: Path, reason: Exception) -> WeightsNotFoundError:
    """The error for a folder of the weights directory that can't be loaded."""
    return WeightsNotFoundError(
        f'{folder} can\'t be loaded ({reason}): remove it, or replace it with `timm-eca convert --force`.')


def fetch_weights(repo_id: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a repository in the Hub's cache, downloaded if they are not there, and checked.

    Raises:
        Exception: What the Hub's client raises; an OSError if the file is not the one that the Hub announced.
    """
    path = Path(hf_hub_download(repo_id, WEIGHTS_FILE, cache_dir=cache_dir))
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


def weights_not_found(
        name: str, repo_id: str, reason: Exception, download: str | None = None) -> WeightsNotFoundError:
    """The error for weights that no source has: a line for each source, then a line for each thing to do.

    Args:
        name: The `<model>.<tag>`.
        repo_id: Its repository on the Hub.
        reason: What the Hub's client raised.
        download: Why the authors' file could not be downloaded, for weights that have one.
    """
    model, _, tag = name.partition('.')
    official = OFFICIAL[model] if tag == TAG else None
    cause = reason.__cause__ if isinstance(reason, LocalEntryNotFoundError) and reason.__cause__ else reason
    why = f'{type(cause).__name__}: {first_line(cause, 200)}'
    cure = 'check the connection, and try again'
    if not isinstance(reason, HUB_ERRORS):  # of the file in the cache
        cure = 'make room, or remove the file from the Hub\'s cache, and try again'
    if constants.HF_HUB_OFFLINE:
        why, cure = 'not in the cache, and HF_HUB_OFFLINE is set', 'unset HF_HUB_OFFLINE'
    elif getattr(getattr(reason, 'response', None), 'status_code', None) in (401, 403, 404):
        # The Hub answers 401 for what is not there, unless there is a token.
        why = f'no public repository with {WEIGHTS_FILE}'
        cure = '' if official else 'log in with `hf auth login`, if the repository is private or gated'
    lines = [f'No weights for {name}:', f'  weights directory: no {weights_dir() / name}', f'  Hub, {repo_id}: {why}']
    if download is not None:
        lines.append(f'  Google Drive: {download}')
    lines += ['What you can do:', *([f'  - {cure}'] if cure else [])]
    if official:
        plain = [key for key, cfg in get_arch_pretrained_cfgs(model).items() if cfg.tag != TAG and cfg.hf_hub_id]
        lines.append(f'  - to fine-tune, start from timm\'s own weights instead: {plain[0]}')
        lines.append(f'  - download {official.url} in a browser, then run `timm-eca convert {official.file}`')
    return WeightsNotFoundError('\n'.join(lines))
