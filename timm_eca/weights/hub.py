"""The way of a folder to the Hugging Face Hub, in one commit, and back."""
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import is_model, list_models, parse_model_name

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.version import __version__
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.names import UnknownModelError, unknown_model
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
    names = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, *(name for name in REPORT_FILES if os.path.exists(folder / name))]
    try:
        for path in (folder / name for name in names):
            if os.path.islink(path) or not os.path.isfile(path):
                raise FolderError(f'{folder} has no {path.name} that is a file itself')
        architecture = check_folder(folder)['architecture']
        card = point_to_repository((folder / CARD_FILE).read_bytes(), repo_id)
    except (FolderError, OSError) as e:
        raise HubError(f'{e}: push a folder that `timm-eca convert` or `timm-eca finetune` made.') from None
    name = repo_id.rpartition('/')[2].lower().replace('-', '_')
    named = [
        model for model in list_models()
        if model in name and re.search(rf'(?<![a-z0-9]){model}(?![a-z0-9])', name)]
    if (longest := max(named, key=len, default=architecture)) != architecture:
        _logger.warning('The weights are of %s, but the name of %s says %s.', architecture, repo_id, longest)
    files = {name: len(card) if name == CARD_FILE else (folder / name).stat().st_size for name in names}
    if dry_run:
        return Push(files, None, True)
    with _client(repo_id) as api:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision).sha
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, card if name == CARD_FILE else folder / name) for name in names],
            commit_message=f'Upload weights with timm_eca {__version__}',
            revision=revision,
            create_pr=create_pr,
        )
    return Push(files, commit.pr_url or commit.commit_url, commit.oid != before)


def add_to_collection(organisation: str, title: str, description: str, repo_ids: Sequence[str]) -> str:
    """Adds repositories to a collection of an organisation, which is found by its title, or made. Returns its address.

    Raises:
        HubError: The Hub can't be reached or refuses.
    """
    with _client(f'the collection {title!r} of {organisation}') as api:
        collection = api.create_collection(title, namespace=organisation, description=description, exists_ok=True)
        for repo_id in repo_ids:
            api.add_collection_item(collection.slug, repo_id, 'model', exists_ok=True)
    return collection.url


@contextmanager
def _client(place: str) -> Iterator[HfApi]:
    """The Hub's client. Its errors become HubErrors that say what to do, whatever a server's answers made of it."""
    api = HfApi(library_name='timm_eca', library_version=__version__)
    try:
        yield api
    except LocalTokenNotFoundError:
        raise HubError('There is no Hugging Face token on this machine: run `hf auth login` or set HF_TOKEN.') from None
    except Exception as e:
        # A RuntimeError is about one of the files, and has the reason behind it.
        error = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ else e
        cures = {
            401: 'run `hf auth login` or set HF_TOKEN to a valid token',
            403: 'use a token with write access',
            404: 'check the name, and that your token may see it',
        }
        status: Any = getattr(getattr(error, 'response', None), 'status_code', None)
        cure = cures.get(status, 'check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and push again')
        if str(error).startswith('Invalid metadata'):  # of the card
            cure = 'correct it'
        raise HubError(
            f'{place} can\'t be published on {api.endpoint} ({type(error).__name__}: {first_line(error)}): {cure}.'
        ) from None


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
        check_cached(folder / WEIGHTS_FILE)
        return folder
    except Exception as e:  # as in `_client`
        raise HubError(
            f'{printable(name)} can\'t be downloaded ({first_line(e)}): check its name and the connection.') from None


def fetch_and_check(name: str) -> str:
    """Downloads the repository that a model's name names, if it names one, and checks the folder.

    Returns:
        The name for `timm.create_model`: a registered name as it was given, or `local-dir:` and the checked folder.

    Raises:
        HubError: There is no such folder or repository, or the download fails.
        FolderError: It is not the folder of a model.
        UnknownModelError: There is no such model.
    """
    source, place = _parse_source(name)
    if source is None:
        if not is_model(place.partition('.')[0]):
            raise UnknownModelError(
                unknown_model(place), 'timm-eca list "eca_*" shows all models',
                'name a folder that convert or finetune made by its path, and a repository as hf-hub:REPOSITORY')
        return name
    folder = fetch_folder(name)
    check_folder(folder, exact=False)
    return f'local-dir:{folder}'


def _parse_source(name: str) -> tuple[str | None, str]:
    """What stands before the colon in a model's name, as timm writes it, and what stands behind."""
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
