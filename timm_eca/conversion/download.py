"""Downloads the authors' checkpoints from Google Drive, and converts them."""
import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, tqdm

from timm_eca.conversion.convert import Conversion, check_names, convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import first_line, printable
from timm_eca.weights.model_folder import WEIGHTS_FILE
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

    `TIMM_ECA_DOWNLOAD=0` and `HF_HUB_OFFLINE` switch the download from Google Drive off.

    Returns:
        The weights file in the Hub's cache, or the folder in the weights directory.

    Raises:
        WeightsNotFoundError: Neither has them, or they can't be written.
    """
    model, repo_id = name.partition('.')[0], hub_id(name)
    reason: Exception
    try:
        if not isinstance(try_to_load_from_cache(repo_id, WEIGHTS_FILE, cache_dir), str):
            # A single question: with its own the client waits 23 seconds in all for a Hub that can't be reached.
            get_hf_file_metadata(hf_hub_url(repo_id, WEIGHTS_FILE))
        return fetch_weights(repo_id, cache_dir)
    except HUB_ERRORS as e:
        reason = e
    except OSError as e:  # the cache can't be written, or what arrived is not what the Hub announced
        raise weights_not_found(name, repo_id, e) from None
    switched_off = os.environ.get('TIMM_ECA_DOWNLOAD') == '0'
    if switched_off or constants.HF_HUB_OFFLINE:
        download = 'switched off by TIMM_ECA_DOWNLOAD=0' if switched_off else None
        raise weights_not_found(name, repo_id, reason, download=download) from None
    try:
        return convert_download(model).folder
    except DownloadError as e:
        raise weights_not_found(name, repo_id, reason, download=e.reason) from None
    except CheckpointError as e:
        folder = find_local_weights(name)  # of another process that was faster
        if folder is None:
            raise WeightsNotFoundError(str(e)) from None
        return folder


def convert_download(
        model: str,
        output: str | os.PathLike | None = None,
        tag: str | None = None,
        force: bool = False,
        use_ema: bool = True,
) -> Conversion:
    """Downloads the authors' checkpoint of a model and converts it. The download itself is not kept.

    Of several processes at once, one downloads; the others wait, and find the folder.

    Args:
        model: Name of the model.
        output: The folder to make, by default `<model>.<tag>` in the weights directory.
        tag: Name of the weights, by default the authors'.
        force: Replace the folder if it is there.
        use_ema: Take the averaged weights (EMA) where the file has both.

    Raises:
        CheckpointError: There is no such model, the folder exists or can't be written, or Google Drive does not send
            the file.
    """
    if model not in OFFICIAL:
        raise CheckpointError(f'The authors published no file for {model!r}: there are {", ".join(OFFICIAL)}.')
    check_names(output, tag)
    official, downloads = OFFICIAL[model], weights_dir() / '.downloads'
    checkpoint = downloads / official.file
    folder = Path(output) if output else weights_dir() / f'{model}.{tag or TAG}'
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(downloads / f'{model}.lock'):
            if not force and os.path.lexists(folder):
                raise CheckpointError(f'{folder} exists: name another --output, or replace it with --force.')
            try:
                _download(official, checkpoint)
                done = convert(checkpoint, output, tag, force, provenance='downloaded', use_ema=use_ema)
            finally:
                checkpoint.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(
            f'{downloads} can\'t be written ({e.strerror or first_line(e)}): make room, or set TIMM_ECA_HOME to '
            'another folder.') from None
    except CheckpointError as e:
        if str(checkpoint) not in str(e):  # the output is at fault, not the download
            raise
        reason = str(e).replace(str(checkpoint), 'what it sent').rpartition(': ')[0]  # without the cure
        raise DownloadError(official, printable(reason, 200)) from None
    if done.identity.model != model:
        raise DownloadError(official, f'what it sent is {done.identity.model}, converted in {done.folder}')
    return done


def _download(official: OfficialCheckpoint, path: Path) -> None:
    """Downloads a file from Google Drive, with huggingface_hub's client: its proxies and certificates."""
    _logger.info('Downloading %s from Google Drive (%s)', official.file, official.url)
    url = DRIVE_URL.format(official.drive_id)
    try:
        with get_session().stream('GET', url, follow_redirects=True, timeout=_SILENCE) as response:
            sender = response.url
            if sender.host != urlsplit(url).hostname and not (
                    sender.scheme == 'https' and sender.host.endswith(_GOOGLE)):
                raise DownloadError(official, f'it redirects to {printable(sender.host)}')
            if response.status_code != 200:
                raise DownloadError(official, f'HTTP {response.status_code}')
            with path.open('wb') as file:
                for chunk in tqdm(response.iter_bytes(1 << 20), desc=official.file, unit='MiB', disable=None):
                    file.write(chunk)
                    if file.tell() > _MAX_BYTES:
                        raise DownloadError(official, f'it sent more than {_MAX_BYTES} bytes')
    except HUB_ERRORS as e:
        raise DownloadError(official, f'{type(e).__name__}: {first_line(e, 200)}') from None
