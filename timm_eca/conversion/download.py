"""Downloads the authors' checkpoints from Google Drive, and converts them."""
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.utils import WeakFileLock, tqdm

from timm_eca.conversion.convert import Conversion, convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import first_line, printable
from timm_eca.weights.official import OFFICIAL, TAG, OfficialCheckpoint
from timm_eca.weights.store import (
    HUB_ERRORS, WeightsNotFoundError, fetch_weights, find_local_weights, hub_id, weights_dir, weights_not_found,
)

__all__ = ['DownloadError', 'convert_download', 'fetch_official']

DRIVE_URL = 'https://drive.usercontent.google.com/download?id={}&export=download&confirm=t'
_GOOGLE = ('.google.com', '.googleusercontent.com')
_SILENCE = 30.  # seconds without a byte
_MAX_BYTES = 2 ** 30  # the largest file has 57 million weights and the optimizer's momentum of each: 0.5 GB

_logger = logging.getLogger(__name__)


class DownloadError(CheckpointError):
    """Google Drive did not send one of the authors' files. `reason` says why, in a few words."""

    def __init__(self, official: OfficialCheckpoint, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f'Google Drive did not send {official.file} ({reason}): download {official.url} in a browser, then run '
            f'`timm-eca convert {official.file}`.')


def fetch_official(name: str, cache_dir: str | Path | None = None) -> Path:
    """The authors' weights from the Hub or else from Google Drive, for `pretrained=True`.

    Of several processes at once, one downloads from Google Drive and converts; the others wait. `TIMM_ECA_DOWNLOAD=0`
    and `HF_HUB_OFFLINE` switch that off.

    Args:
        name: The `<model>.<tag>`.
        cache_dir: The Hub's cache, by default huggingface_hub's own.

    Returns:
        The weights file in the Hub's cache, or the folder in the weights directory.

    Raises:
        WeightsNotFoundError: Neither has them, or they can't be written.
    """
    model, repo_id = name.partition('.')[0], hub_id(name)
    reason: Exception | None = None
    try:
        cached = fetch_weights(repo_id, cache_dir, retry=False)
        if cached is not None:
            return cached
    except HUB_ERRORS as e:
        reason = e
    except OSError as e:  # the cache can't be written, or what arrived is not what the Hub announced
        raise weights_not_found(name, repo_id, e) from None
    switched_off = os.environ.get('TIMM_ECA_DOWNLOAD') == '0'
    if switched_off or constants.HF_HUB_OFFLINE:
        download = 'switched off by TIMM_ECA_DOWNLOAD=0' if switched_off else None
        raise weights_not_found(name, repo_id, reason, download=download) from None
    try:
        with _download_folder(model) as folder:
            return find_local_weights(name) or _download_and_convert(model, folder).folder
    except DownloadError as e:
        raise weights_not_found(name, repo_id, reason, download=e.reason) from None
    except CheckpointError as e:
        raise WeightsNotFoundError(str(e)) from None


def convert_download(
        model: str,
        output: str | os.PathLike | None = None,
        force: bool = False,
        **kwargs: Any,
) -> Conversion:
    """Downloads the authors' checkpoint of a model and converts it. The download itself is not kept.

    Args:
        model: Name of the model.
        output: The folder to make, by default `<model>.<tag>` in the weights directory.
        force: Replace the folder if it is there.
        **kwargs: Other arguments of `convert`.

    Raises:
        CheckpointError: There is no such model, the folder exists or can't be written, or Google Drive does not send
            the file.
    """
    if model not in OFFICIAL:
        raise CheckpointError(f'The authors published no file for {model!r}: there are {", ".join(OFFICIAL)}.')
    with _download_folder(model) as folder:
        done = Path(output) if output else weights_dir() / f'{model}.{kwargs.get("tag") or TAG}'
        if not force and os.path.lexists(done):
            raise CheckpointError(f'{done} exists: name another --output, or replace it with --force.')
        return _download_and_convert(model, folder, output=output, force=force, **kwargs)


@contextmanager
def _download_folder(model: str) -> Iterator[Path]:
    """A folder for the download in the weights directory, for one process at a time."""
    folder = weights_dir() / '.downloads'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / f'{model}.lock'):
            yield folder
    except OSError as e:
        raise CheckpointError(
            f'{folder} can\'t be written ({e.strerror or first_line(e)}): make room, or set TIMM_ECA_HOME to another '
            'folder.') from None


def _download_and_convert(model: str, folder: Path, **kwargs: Any) -> Conversion:
    official = OFFICIAL[model]
    checkpoint = folder / official.file
    _logger.info('Downloading %s from Google Drive (%s)', official.file, official.url)
    try:
        _download(official, checkpoint)
        done = convert(checkpoint, provenance='downloaded', progress=True, **kwargs)
    except CheckpointError as e:
        if str(checkpoint) not in str(e):  # the output is at fault, not the download
            raise
        reason = str(e).replace(str(checkpoint), 'what it sent').rpartition(': ')[0]  # without the cure
        raise DownloadError(official, printable(reason, 200)) from None
    finally:
        checkpoint.unlink(missing_ok=True)
    if done.identity.model != model:
        raise DownloadError(official, f'what it sent is {done.identity.model}, converted in {done.folder}')
    return done


def _download(official: OfficialCheckpoint, path: Path) -> None:
    """Downloads a file from Google Drive, with huggingface_hub's client: its proxies and certificates.

    Raises:
        DownloadError: Something else than a file arrives, or nothing.
        OSError: The file can't be written.
    """
    try:
        with get_session().stream(
                'GET', DRIVE_URL.format(official.drive_id), headers={'Accept-Encoding': 'identity'},
                follow_redirects=True, timeout=_SILENCE,
        ) as response:
            asked, url = [*response.history, response][0].url, response.url
            if url.host != asked.host and not (url.scheme == 'https' and url.host.endswith(_GOOGLE)):
                raise DownloadError(official, f'it redirects to {printable(url.host)}')
            if response.status_code != 200:
                raise DownloadError(official, f'HTTP {response.status_code}')
            size = int(response.headers.get('Content-Length', 0)) or None
            with path.open('wb') as file, tqdm(
                    desc=f'{official.file} from Google Drive', total=size, unit='B', unit_scale=True, disable=None,
            ) as bar:
                for chunk in response.iter_bytes(1 << 20):
                    if file.tell() == 0 and chunk.lstrip().startswith(b'<'):
                        title = re.search(rb'<title[^>]*>([^<]*)', chunk, re.IGNORECASE)
                        name = f' "{printable(title[1].decode(errors="replace").strip())}"' if title else ''
                        raise DownloadError(official, f'it sent a web page{name}')
                    if file.tell() > _MAX_BYTES:
                        raise DownloadError(official, f'it sent more than {_MAX_BYTES} bytes')
                    file.write(chunk)
                    bar.update(len(chunk))
    except (*HUB_ERRORS, OSError) as e:  # type: ignore[misc]
        if isinstance(e, OSError) and e.errno:  # of the file
            raise
        raise DownloadError(official, f'{type(e).__name__}: {first_line(e, 200)}') from None
