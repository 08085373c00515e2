"""The way of a folder to the Hugging Face Hub, in one commit, and back."""
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import list_models, parse_model_name

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.version import __version__
from timm_eca.weights.model_folder import (
    CARD_FILE, CONFIG_FILE, PICKLE_FILE, REPORT_FILES, WEIGHTS_FILE, FolderError, check_folder,
)
from timm_eca.weights.store import check_cached

__all__ = [
    'HubError', 'Push', 'add_to_collection', 'check_repo_id', 'fetch_and_check', 'fetch_folder', 'point_to_repository',
    'push_folder',
]

_logger = logging.getLogger(__name__)


class HubError(TimmEcaError, RuntimeError):
    """A folder that can't be published, or a Hub that doesn't take it; says what to do about it."""


class Push(NamedTuple):
    """What `push_folder` did."""
    repo_id: str
    files: dict[str, int]  # the files' sizes in bytes
    url: str | None  # of the commit or the pull request; None for a dry run
    changed: bool  # False where the repository had these files already


def push_folder(
        folder: str | os.PathLike,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: bool = False,
) -> Push:
    """Uploads the weights, the config and the card of a folder, and the report of a run, in one atomic commit.

    The repository is made if it is not there. What the repository has already makes no new commit. The token is
    huggingface_hub's own (`hf auth login`, `$HF_TOKEN`). The examples in the card name the repository there.

    Args:
        folder: A folder that `convert` or `finetune` wrote, or `timm.models.save_for_hf` with a card.
        repo_id: The repository, `<organisation or user>/<name>`.
        private: Make a new repository a private one.
        revision: Branch to commit to, made if it is not there; by default `main`.
        create_pr: Open a pull request instead.
        dry_run: Check the folder and say what would be uploaded, without any network.

    Raises:
        HubError: The folder is not a whole one, or the Hub can't be reached or refuses.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    files = _check_folder(folder)
    card = point_to_repository((folder / CARD_FILE).read_bytes(), repo_id)
    files[CARD_FILE] = len(card)
    _warn_of_other_name(check_folder(folder).architecture, repo_id)
    if dry_run:
        return Push(repo_id, files, None, True)
    api = HfApi(library_name='timm_eca', library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision).sha
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, card if name == CARD_FILE else folder / name) for name in files],
            commit_message=f'Upload weights with timm_eca {__version__}',
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as e:  # the client raises whatever a server's answers make it stumble over
        raise HubError(_explain(e, repo_id, api.endpoint, folder)) from None
    return Push(repo_id, files, commit.pr_url or commit.commit_url, commit.oid != before)


def add_to_collection(organisation: str, title: str, description: str, repo_ids: Sequence[str]) -> str:
    """Adds repositories to a collection of an organisation, which is made if it is not there.

    Args:
        organisation: The organisation or user.
        title: The collection's title, by which it is found again.
        description: Its description if it is made, up to 150 characters.
        repo_ids: The repositories. Those in the collection already are left as they are.

    Returns:
        The address of the collection.

    Raises:
        HubError: The Hub can't be reached or refuses.
    """
    api = HfApi(library_name='timm_eca', library_version=__version__)
    try:
        collection = api.create_collection(title, namespace=organisation, description=description, exists_ok=True)
        present = {item.item_id for item in collection.items}
        for repo_id in repo_ids:
            if repo_id not in present:
                api.add_collection_item(collection.slug, repo_id, 'model', exists_ok=True)
    except Exception as e:  # as in `push_folder`
        raise HubError(_explain(e, f'the collection {title!r} of {organisation}', api.endpoint, Path())) from None
    return collection.url


def fetch_folder(name: str) -> Path:
    """A folder by its path, or by `hf-hub:ORGANISATION/NAME[@REVISION]`: the one in the Hub's cache, after a download.

    What was downloaded is compared with the SHA-256 that the Hub gave for it.

    Raises:
        HubError: There is no such folder or repository, or the download fails.
    """
    source, place = _parse_source(name)
    if source != 'hf-hub':
        if not os.path.isdir(place):
            raise HubError(f'{printable(place)} is not a folder: name one, or hf-hub:ORGANISATION/NAME.')
        return Path(place)
    repo_id, _, revision = place.partition('@')
    try:
        files = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE]
        folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))
        if not (folder / WEIGHTS_FILE).exists():
            snapshot_download(repo_id, revision=revision or folder.name, allow_patterns=[PICKLE_FILE])
        for file in (WEIGHTS_FILE, PICKLE_FILE):
            if (folder / file).exists():
                check_cached(folder / file)
        return folder
    except Exception as e:  # as in `push_folder`
        raise HubError(
            f'{printable(name)} can\'t be downloaded ({first_line(e)}): check its name and the connection.') from None


def fetch_and_check(name: str) -> str:
    """Downloads the repository that a model's name names, if it names one, and checks the folder.

    Returns:
        The name for `timm.create_model`: a registered name as it was given, or `local-dir:` and the checked folder.

    Raises:
        HubError: There is no such folder or repository, or the download fails.
        FolderError: It is not the folder of a model.
    """
    source, _ = _parse_source(name)
    if source is None:
        return name
    folder = fetch_folder(name)
    check_folder(folder, exact=False)
    return f'local-dir:{folder}'


def _parse_source(name: str) -> tuple[str | None, str]:
    """What stands before the colon in a model's name, as timm writes it, and what stands behind.

    Raises:
        HubError: It is no source that timm knows.
    """
    if os.path.isdir(name):
        return 'local-dir', name
    try:
        return parse_model_name(name)
    except ValueError as e:
        raise HubError(f'{printable(name)} can\'t name a model ({first_line(e)}): see timm-eca list.') from None


def check_repo_id(repo_id: str) -> None:
    """Raises a HubError unless this can be the name of a repository, with its organisation or user."""
    try:
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            raise HFValidationError('it has no organisation')
    except HFValidationError as e:
        raise HubError(f'{repo_id!r} can\'t name a repository ({first_line(e)}): use ORGANISATION/NAME.') from None


def point_to_repository(card: bytes, repo_id: str) -> bytes:
    """A card whose examples load the weights from a repository instead of from its own folder (`local-dir:.`)."""
    return re.sub(rb'local-dir:\.(?![\w./-])', f'hf-hub:{repo_id}'.encode(), card)


def _warn_of_other_name(architecture: str, repo_id: str) -> None:
    """Warns if the name of a repository has that of another model in it."""
    name = repo_id.rpartition('/')[2].lower().replace('-', '_')
    named = [model for model in list_models() if re.search(rf'(?<![a-z0-9]){model}(?![a-z0-9])', name)]
    longest = max(named, key=len, default=architecture)
    if longest != architecture:
        _logger.warning(f'The weights are of {architecture}, but the name of {repo_id} says {longest}.')


def _check_folder(folder: Path) -> dict[str, int]:
    """The sizes of the files of a folder, or a HubError where one is missing or no model's."""
    required = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
    files = {name: folder / name for name in (*required, *REPORT_FILES) if (folder / name).is_file()}
    try:
        for name in required:
            if name not in files:
                raise FolderError(f'{folder} has no {name}')
        for path in files.values():
            if path.is_symlink():
                raise FolderError(f'{path} is a link and not the file itself')
        check_folder(folder)
    except FolderError as e:
        raise HubError(f'{e}: push a folder that `timm-eca convert` or `timm-eca finetune` made.') from None
    return {name: path.stat().st_size for name, path in files.items()}


def _explain(error: Exception, repo_id: str, endpoint: str, folder: Path) -> str:
    """What went wrong on the way to the Hub, and what to do about it."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one of the files
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return 'There is no Hugging Face token on this machine: run `hf auth login` or set HF_TOKEN.'
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        cure = {
            401: 'run `hf auth login` or set HF_TOKEN to a valid token',
            403: 'use a token with write access, or --create-pr',
            404: 'check the name, and that your token may see it',
        }.get(status, 'wait a while and push again')
        return f'The Hub refuses the upload to {repo_id} (HTTP {status}: {first_line(error)}): {cure}.'
    if isinstance(error, ValueError) and str(error).startswith('Invalid metadata'):
        reason = printable(' '.join(str(error).split()[4:]), 300)
        return f'The Hub refuses the metadata of {folder / CARD_FILE} ({reason}): correct it.'
    return (
        f'The Hub ({endpoint}) can\'t be reached, or it does not answer as the Hub does ({type(error).__name__}: '
        f'{first_line(error)}): check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and push again.')
