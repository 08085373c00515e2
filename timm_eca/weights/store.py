"""Where weights are: in the weights directory of this machine, and in repositories of the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `timm-eca convert` writes them.
`timm_eca.conversion.pretrained` searches both.
"""
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open

from timm_eca.errors import TimmEcaError, first_line
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import CONFIG_FILE, WEIGHTS_FILE, FolderError, read_config, weights_path

__all__ = [
    'HUB_ERRORS', 'HUB_ORG', 'WeightsNotFoundError', 'check_cached', 'check_weights', 'explain_hub_error',
    'fetch_files', 'find_local_weights', 'hub_id', 'unreadable_weights', 'weights_dir',
]

HUB_ORG = 'timm-eca'  # organisation on the Hub with the converted weights, unless $TIMM_ECA_HUB_ORG names another
# What the Hub's client raises. Its base class for failed requests is in httpx or httpx2.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], EntryNotFoundError, HFValidationError, OfflineModeIsEnabled,
)


class WeightsNotFoundError(TimmEcaError, RuntimeError):
    """No source has the pretrained weights, or they can't be loaded.

    `sources` has a line for each source that was tried. `problem` ends with these lines.
    """

    def __init__(self, problem: str, *fixes: str, sources: Sequence[str] = ()) -> None:
        self.sources = tuple(sources)
        if sources:
            problem = '\n'.join((f'{problem}:', *(f'  {source}' for source in sources), 'What you can do:'))
        super().__init__(problem, *fixes)


def hub_id(name: str) -> str:
    """The repository on the Hub of a `<model>.<tag>` of the authors."""
    return f'{os.environ.get("TIMM_ECA_HUB_ORG") or HUB_ORG}/{name}'


def weights_dir() -> Path:
    """The weights directory: `$TIMM_ECA_HOME`, else `timm_eca` in huggingface_hub's `HF_HOME`."""
    home = os.environ.get('TIMM_ECA_HOME')
    return Path(home).expanduser() if home else Path(constants.HF_HOME) / 'timm_eca'


def find_local_weights(name: str) -> Path | None:
    """The folder of a `<model>.<tag>` in the weights directory, or None if there is none.

    Raises:
        WeightsNotFoundError: As `check_weights`.
    """
    folder = weights_dir() / name
    if not folder.is_dir():
        return None
    check_weights(folder, name.partition('.')[0])
    return folder


def check_weights(folder: Path, model: str) -> None:
    """Reads the config of a folder and the header of its weights: fast, as no model is built.

    Raises:
        WeightsNotFoundError: A file is missing or damaged, or the folder holds another model.
    """
    try:
        architecture = read_config(folder / CONFIG_FILE)['architecture']
        if architecture not in (model, model.removeprefix('eca_')):  # the latter is timm's own form of the model
            raise FolderError(f'it holds weights of {architecture}')
        weights = weights_path(folder)
        if weights.name == WEIGHTS_FILE:
            with safe_open(weights, framework='pt'):  # compares the header with the length of the file
                pass
    except (FolderError, OSError, SafetensorError) as e:
        raise unreadable_weights(folder, e) from e


def unreadable_weights(folder: Path, error: Exception) -> WeightsNotFoundError:
    """The error for a folder in the weights directory, or of the Hub's cache, that can't be loaded."""
    fix = 'remove it, or replace it with `timm-eca convert --force`'
    if folder.parent != weights_dir():
        fix = f'remove {folder.parents[1]} to download it again'
    return WeightsNotFoundError(f'{folder} can\'t be loaded ({first_line(error)})', fix)


def fetch_files(repo_id: str, names: Sequence[str], cache_dir: str | Path | None = None) -> Path:
    """Downloads files of a repository to the Hub's cache, unless they are there, and checks what it downloads.

    Returns:
        Their folder.

    Raises:
        HUB_ERRORS: The Hub does not answer, or does not have a file.
        OSError: The cache can't be written, or a download has another SHA-256 than the Hub announced.
    """
    for name in names:
        cached = try_to_load_from_cache(repo_id, name, cache_dir)
        if not isinstance(cached, str):
            get_hf_file_metadata(hf_hub_url(repo_id, name))  # hf_hub_download would try for half a minute
        path = hf_hub_download(repo_id, name, cache_dir=cache_dir)
        if path != cached:
            check_cached(Path(path))
    return Path(path).parent


def check_cached(path: Path) -> None:
    """Compares a file in the Hub's cache with its SHA-256 from the Hub. Removes it and raises an OSError if it differs.

    huggingface_hub itself compares only the length.
    """
    blob = path.resolve()  # large files have their SHA-256 as name
    if re.fullmatch('[0-9a-f]{64}', blob.name):
        found = file_sha256(blob)
        if found != blob.name:
            with suppress(OSError):  # another process may have removed it
                path.unlink()
                blob.unlink()
            raise OSError(f'the download of {path.name} has the SHA-256 {found}, not {blob.name}')


def explain_hub_error(error: Exception) -> tuple[str, str]:
    """Why a download failed, in a few words, and a fix. `error` is from `fetch_files`, or from timm's own download."""
    if constants.HF_HUB_OFFLINE and isinstance(error, HUB_ERRORS):
        return 'not in the cache, and HF_HUB_OFFLINE is set', 'unset HF_HUB_OFFLINE'
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    why = f'{type(error).__name__}: {first_line(error, 200)}'
    response: Any = getattr(error, 'response', None)
    status = getattr(response, 'status_code', None)
    if status == 501 or (status == 404 and '/xet-' in response.url.path):
        return f'this server can\'t do that (HTTP {status})', 'set HF_HUB_DISABLE_XET=1, or use another HF_ENDPOINT'
    if status in (401, 403, 404):  # without a token, the Hub answers 401 for what does not exist
        return 'no public repository with these files', 'log in with `hf auth login` if the repository is private'
    if isinstance(error, ConnectionError):  # hf_xet raises it when a server refuses
        return why, 'set HF_HUB_DISABLE_XET=1 if the server has no Xet, or check the connection'
    if isinstance(error, (*HUB_ERRORS, URLError)):
        return why, 'check the connection, and try again'
    return why, 'make room, or remove the file from the Hub\'s cache, and try again'
