"""Where pretrained weights come from: the weights directory of this machine, then the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `convert_weights.py` writes them: `config.json`,
`model.safetensors` and a card.
"""
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError

from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import PICKLE_FILE, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.official import OFFICIAL

__all__ = [
    'HUB_ERRORS', 'HUB_ORG', 'WeightsNotFoundError', 'check_cached', 'fetch_weights', 'find_local_weights', 'hub_id',
    'names_source', 'unknown_tag', 'unreadable_weights', 'weights_dir', 'weights_not_found',
]

HUB_ORG = 'timm-eca'  # the organisation on the Hub that holds the converted weights; $TIMM_ECA_HUB_ORG goes before it
# What the Hub's client raises: for answers of the Hub and, by their base in httpx or httpx2, for want of an answer.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], EntryNotFoundError, HFValidationError, OfflineModeIsEnabled,
)


class WeightsNotFoundError(TimmEcaError, RuntimeError):
    """Pretrained weights were asked for that are neither on this machine nor to be had from the Hub."""


def hub_id(name: str) -> str:
    """The repository on the Hub of a `<model>.<tag>`."""
    return f'{os.environ.get("TIMM_ECA_HUB_ORG") or HUB_ORG}/{name}'


def weights_dir() -> Path:
    """The weights directory: `$TIMM_ECA_HOME`, else `timm_eca` in huggingface_hub's `HF_HOME`."""
    home = os.environ.get('TIMM_ECA_HOME')
    return Path(home).expanduser() if home else Path(constants.HF_HOME) / 'timm_eca'


def find_local_weights(name: str) -> Path | None:
    """The folder of a `<model>.<tag>` in the weights directory, or None where it has none.

    Raises:
        WeightsNotFoundError: There is a folder of that name, but it isn't a whole one or holds another model.
    """
    folder = weights_dir() / name
    if not folder.is_dir():
        return None
    model = name.partition('.')[0]
    cure = f'convert the weights again with `timm-eca convert --force`, or remove {folder}'
    try:
        architecture = check_folder(folder).architecture
    except FolderError as e:
        raise WeightsNotFoundError(f'{e}: {cure}.') from None
    if architecture != model:
        raise WeightsNotFoundError(f'{folder} holds a model of architecture {architecture!r}, not {model}: {cure}.')
    return folder


def fetch_weights(repo_id: str, cache_dir: str | Path | None = None) -> Path | None:
    """The weights of a repository in the Hub's cache, downloaded if they aren't there, and checked.

    Returns:
        The file, or None where the repository has no safetensors.

    Raises:
        Exception: What the Hub's client raises; an OSError where something else has arrived.
    """
    try:
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
        f'{folder} can\'t be loaded ({type(reason).__name__}: {reason}): convert the weights again with '
        f'`timm-eca convert --force`, or remove {folder}.'
    )


def unknown_tag(name: str, known: list[str]) -> WeightsNotFoundError:
    """The error for a tag that neither timm's registry nor the weights directory has."""
    return WeightsNotFoundError(
        f'Unknown weights {name}: there are {", ".join(known)}, and no folder {weights_dir() / name}.'
    )


def weights_not_found(name: str, repo_id: str, reason: Exception, cached: Path | None = None) -> WeightsNotFoundError:
    """The error for weights that are in neither place: what was looked for, and the ways on."""
    model = name.partition('.')[0]
    ways = []
    if isinstance(reason, SafetensorError) and cached is not None:
        ways.append(f'remove {cached}, which is damaged, and try again')
    elif getattr(getattr(reason, 'response', None), 'status_code', None) not in (401, 403, 404):
        ways.append('try again with a better connection')
    if repo_id == hub_id(name) and model in OFFICIAL:
        official = OFFICIAL[model]
        ways.append(
            f'download the authors\' file from {official.url} and run `timm-eca convert {official.file}` '
            f'(or both at once, `timm-eca convert --download {model}`)'
        )
        ways.append('set TIMM_ECA_HUB_ORG to an organisation of the Hub that has it')
    ways += [
        'load a folder that you have: create_model(\'local-dir:FOLDER\', pretrained=True)',
        'or start from random weights: pretrained=False',
    ]
    why = printable(' '.join(str(reason).split('\n\n')[0].split()), 400)
    return WeightsNotFoundError(
        f'No weights for {name}: they are neither in {weights_dir() / name} nor on the Hub as {repo_id} '
        f'({type(reason).__name__}: {why}). Ways on: ' + '; '.join(ways) + '.'
    )
