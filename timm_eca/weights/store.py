"""Where weights are: in the weights directory of this machine, and in repositories of the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `timm-eca convert` writes them.
`timm_eca.conversion.pretrained` searches both.
"""
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.error import URLError

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    BadRequestError, EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError,
    OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from timm_eca.errors import TimmEcaError, first_line
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, read_config, weights_path
from timm_eca.weights.names import base_name

__all__ = [
    'HUB_ERRORS', 'HUB_ORG', 'WeightsNotFoundError', 'check_weights', 'explain_hub_error', 'fetch_files',
    'find_local_weights', 'hub_id', 'unreadable_weights', 'weights_dir',
]

HUB_ORG = 'timm-eca'  # organisation on the Hub with the converted weights, unless $TIMM_ECA_HUB_ORG names another
# What the Hub's client raises. Its base class for failed requests is in httpx or httpx2.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], EntryNotFoundError, HFValidationError, OfflineModeIsEnabled,
)
# What to try after an error: the first that fits.
_FIXES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (JSONDecodeError, 'check HF_ENDPOINT, and whether this network wants a login in the browser'),  # a web page
    (HFValidationError, 'use ORGANISATION/NAME'),
    (ConnectionError, 'set HF_HUB_DISABLE_XET=1 if the server has no Xet, or check the connection'),  # of hf_xet
    ((*HUB_ERRORS, URLError), 'check the connection and HF_ENDPOINT, and try again'),
    ((OSError, SafetensorError), 'make room on the disk, or remove the file from the Hub\'s cache, and try again'),
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
    """The folder of a `<model>.<tag>` in the weights directory, checked, or None if there is none."""
    folder = weights_dir() / name
    if not folder.is_dir():
        return None
    check_weights(folder, name.partition('.')[0])
    return folder


def check_weights(folder: Path, model: str) -> None:
    """Raises a WeightsNotFoundError if a file of the folder is missing or damaged, or if it holds another model.

    It may hold the model in timm's own form, or the plain model for a warm start. No model is built for this.
    """
    try:
        architecture = read_config(folder / CONFIG_FILE)['architecture']
        if architecture not in (model, base_name(model)):
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


def fetch_files(
        repo_id: str,
        names: Sequence[str],
        cache_dir: str | Path | None = None,
        revision: str | None = None,
) -> Path:
    """Downloads files of a repository to the Hub's cache, unless they are there. Returns their folder.

    A download is compared with its SHA-256 from the Hub, once. huggingface_hub itself compares only the length.

    Raises:
        HUB_ERRORS: The Hub does not answer, or does not have a file.
        OSError: The cache can't be written, or a download has another SHA-256. It is removed then.
    """
    for name in names:
        cached = try_to_load_from_cache(repo_id, name, cache_dir, revision)
        if not isinstance(cached, str):
            # hf_hub_download would try for half a minute
            get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision))
        path = Path(hf_hub_download(repo_id, name, cache_dir=cache_dir, revision=revision))
        blob = path.resolve()  # large files have their SHA-256 as name
        if str(path) != cached and re.fullmatch('[0-9a-f]{64}', blob.name) and file_sha256(blob) != blob.name:
            with suppress(OSError):  # another process may have removed it
                path.unlink()
                blob.unlink()
            raise OSError(f'the SHA-256 of {name} differs from the Hub\'s')
    return path.parent


def explain_hub_error(error: BaseException) -> tuple[str, tuple[str, ...]]:
    """Why a request to the Hub failed, in a few words, and fixes. There are none for errors that are not the Hub's."""
    if constants.HF_HUB_OFFLINE and isinstance(error, HUB_ERRORS):
        return 'not in the cache, and HF_HUB_OFFLINE is set', ('unset HF_HUB_OFFLINE',)
    if isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # it tells more: a file was not uploaded, or is not in the cache
    why = f'{type(error).__name__}: {first_line(error)}'
    response: Any = getattr(error, 'response', None)
    status = getattr(response, 'status_code', None)
    if status == 501 or (status == 404 and '/xet-' in response.url.path):
        return f'this server can\'t do that (HTTP {status})', ('set HF_HUB_DISABLE_XET=1, or use another HF_ENDPOINT',)
    if status == 404 or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        return 'no public repository with these files', (
            'check the name, and log in with `hf auth login` if the repository is private',)
    if status in (401, 403):
        return why, ('log in with `hf auth login` or HF_TOKEN; a push needs a token with write access',)
    if isinstance(error.__cause__, BadRequestError):  # the Hub checks the metadata of the card
        return why, (f'correct the metadata at the top of {CARD_FILE}',)
    return why, next(((fix,) for kinds, fix in _FIXES if isinstance(error, kinds)), ())
