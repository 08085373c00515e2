"""Uploads a folder to the Hugging Face Hub in one commit, and downloads one."""
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile  # 1.0 does not export it elsewhere
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import is_model, is_model_pretrained, parse_model_name

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.version import __version__
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.names import UnknownModelError, unknown_model
from timm_eca.weights.store import HUB_ERRORS, explain_hub_error, fetch_files

__all__ = [
    'HubError', 'Push', 'add_to_collection', 'check_repo_id', 'fetch_and_check', 'fetch_folder', 'point_to_repository',
    'push_folder',
]

_logger = logging.getLogger(__name__)

_COMMIT_TITLE = 'Upload weights with timm_eca'  # marks the commits of `push_folder`


class HubError(TimmEcaError, RuntimeError):
    """A folder can't be published or downloaded."""


class Push(NamedTuple):
    """The result of `push_folder`."""
    files: dict[str, int]  # size in bytes of each file
    url: str | None  # of the commit or the pull request; None for a dry run
    changed: bool  # False if the repository had these files already
    notes: tuple[str, ...] = ()  # sentences on what is there, for the user


def push_folder(
        folder: str | os.PathLike,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: bool = False,
        replace_card: bool = False,
) -> Push:
    """Uploads the weights, the config and the card of a folder, and the report of a run, in one atomic commit.

    Creates the repository if there is none. Makes no commit if the repository has the same files. The examples in the
    uploaded card load the weights from the repository. A card in the repository that somebody edited stays.

    Args:
        folder: A folder that `convert`, `finetune` or `timm.models.save_for_hf` wrote, with a card.
        repo_id: The repository, `<organisation or user>/<name>`.
        private: Create a private repository, and upload nothing if the repository is public.
        revision: The branch for the commit, created if there is none.
        create_pr: Open a pull request instead.
        dry_run: Check the folder, look at the repository if it can be reached, and change nothing.
        replace_card: Replace an edited card, too.

    Raises:
        HubError: The folder fails the check, the Hub can't be reached, or it refuses.
    """
    check_repo_id(repo_id)
    contents = _read_folder(Path(folder), repo_id)
    api = HfApi(library_name='timm_eca', library_version=__version__)
    url, changed, notes = None, True, []
    with _explaining(f'{repo_id} can\'t be published on {api.endpoint}'):
        if not dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            with _explaining('can\'t look at the repository'):
                before = api.model_info(repo_id, revision=revision)
        except HubError as e:
            if not dry_run:
                raise
            return Push(_sizes(contents), None, True, (e.problem,))
        if private and not before.private:
            raise HubError(
                f'{repo_id} on {api.endpoint} is public, so nothing was uploaded',
                'make it private in its settings there, and push again', 'push without --private')
        if not replace_card and _is_edited(api, repo_id, revision):
            del contents[CARD_FILE]
            notes.append(f'{CARD_FILE} there is not from a push and stays (push --replace-card replaces it)')
        if not dry_run:
            commit = api.create_commit(
                repo_id,
                list(contents.values()),
                commit_message=f'{_COMMIT_TITLE} {__version__}',
                revision=revision,
                create_pr=create_pr,
            )
            url, changed = commit.pr_url or commit.commit_url, commit.oid != before.sha
    return Push(_sizes(contents), url, changed, tuple(notes))


def _read_folder(folder: Path, repo_id: str) -> dict[str, CommitOperationAdd]:
    """Checks a folder, and returns what to upload by file name."""
    names = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, *(name for name in REPORT_FILES if os.path.exists(folder / name))]
    fix = 'push a folder that `timm-eca convert` or `timm-eca finetune` made'
    try:
        for path in (folder / name for name in names):
            if os.path.islink(path) or not os.path.isfile(path):
                raise FolderError(f'{folder} has no {path.name} that is a regular file')
        check_folder(folder)
        card = point_to_repository((folder / CARD_FILE).read_bytes(), repo_id)
        return {name: CommitOperationAdd(name, card if name == CARD_FILE else folder / name) for name in names}
    except FolderError as e:
        raise HubError(e.problem, fix) from e
    except OSError as e:
        raise HubError(f'{folder} can\'t be read ({first_line(e)})', fix) from e


def _sizes(contents: dict[str, CommitOperationAdd]) -> dict[str, int]:
    return {name: operation.upload_info.size for name, operation in contents.items()}


def _is_edited(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the card of a repository was last changed by a commit that is not from `push_folder`."""
    card = next(iter(api.get_paths_info(repo_id, CARD_FILE, revision=revision, expand=True)), None)
    if not isinstance(card, RepoFile):
        return False
    return card.last_commit is None or not card.last_commit.title.startswith(_COMMIT_TITLE)


def add_to_collection(organisation: str, title: str, description: str, repo_ids: Sequence[str]) -> str:
    """Adds repositories to the collection with this title of an organisation, and creates it if there is none.

    Returns its address. A HubError means that the Hub can't be reached or refuses.
    """
    api = HfApi(library_name='timm_eca', library_version=__version__)
    with _explaining(f'the collection {title!r} of {organisation} can\'t be published on {api.endpoint}'):
        collection = api.create_collection(title, namespace=organisation, description=description, exists_ok=True)
        for repo_id in repo_ids:
            api.add_collection_item(collection.slug, repo_id, 'model', exists_ok=True)
    return collection.url


@contextmanager
def _explaining(problem: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub into HubErrors that name a fix. Other errors pass."""
    try:
        yield
    except TimmEcaError:
        raise
    except (*HUB_ERRORS, OSError, ValueError, RuntimeError) as e:  # type: ignore[misc]
        why, fixes = explain_hub_error(e)
        if not fixes:
            raise
        raise HubError(f'{problem} ({why})', *fixes) from e


def fetch_folder(name: str) -> Path:
    """The path of a folder. Downloads `hf-hub:ORGANISATION/NAME[@REVISION]` into the Hub's cache.

    Raises a HubError if there is no such folder or repository, or the download fails.
    """
    source, place = _parse_source(name)
    if source == 'hf-hub':
        repo_id, _, revision = place.partition('@')
        with _explaining(f'{printable(name)} can\'t be downloaded'):
            return fetch_files(repo_id, [CONFIG_FILE, WEIGHTS_FILE], revision=revision or None)
    if not os.path.isdir(place):
        raise HubError(f'{printable(place)} is not a folder', 'name a folder, or hf-hub:ORGANISATION/NAME')
    return Path(place)


def fetch_and_check(name: str) -> str:
    """Downloads the repository if a model's name names one, and checks the folder.

    A registered name goes before a folder of that name: write `./NAME` for the folder.

    Returns:
        The name for `timm.create_model`: a registered name unchanged, otherwise `local-dir:` and the checked folder.

    Raises:
        HubError: There is no such folder or repository, or the download fails.
        FolderError: It is not the folder of a model.
        UnknownModelError: There is no such model.
    """
    if is_model_pretrained(name) or ('.' not in name and is_model(name)):
        if os.path.isdir(name):
            _logger.warning('%s is a registered model: use ./%s for the folder of that name.', name, name)
        return name
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
    """The source of a model in timm's words (`hf-hub`, `local-dir`, None for a registered name), and the rest."""
    if os.path.isdir(name):
        return 'local-dir', name
    try:
        return parse_model_name(name)
    except ValueError as e:
        raise HubError(f'{printable(name)} can\'t name a model ({first_line(e)})', 'see timm-eca list') from e


def check_repo_id(repo_id: str) -> None:
    """Raises a HubError unless this can name a repository of an organisation or user."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise HubError(f'{repo_id!r} can\'t name a repository ({first_line(e)})', 'use ORGANISATION/NAME') from e
    if '/' not in repo_id:
        raise HubError(f'{repo_id!r} names no organisation', 'use ORGANISATION/NAME')


def point_to_repository(card: bytes, repo_id: str) -> bytes:
    """Makes the examples of a card load the weights from a repository, not from the card's folder (`local-dir:.`)."""
    return re.sub(rb'local-dir:\.(?![\w./-])', f'hf-hub:{repo_id}'.encode(), card)
