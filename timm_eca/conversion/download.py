"""Downloads the authors' checkpoints from Google Drive, and converts them."""
import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.utils import WeakFileLock, tqdm

from timm_eca.conversion.convert import Conversion, check_tag, convert
from timm_eca.conversion.identify import identify
from timm_eca.conversion.reader import CheckpointError, read_checkpoint
from timm_eca.errors import first_line, printable
from timm_eca.weights.official import OFFICIAL, TAG, OfficialCheckpoint
from timm_eca.weights.store import HUB_ERRORS, weights_dir

__all__ = ['CheckpointError', 'DownloadError', 'convert_download']

DRIVE_URL = 'https://drive.usercontent.google.com/download?id={}&export=download&confirm=t'
_GOOGLE = ('.google.com', '.googleusercontent.com')
_SILENCE = 30.  # seconds without a byte

_logger = logging.getLogger(__name__)


class DownloadError(CheckpointError):
    """Google Drive did not send one of the authors' files. `reason` says why, in a few words."""

    def __init__(self, official: OfficialCheckpoint, reason: str) -> None:
        self.reason = printable(reason, 200)
        super().__init__(
            f'Google Drive did not send {official.file} ({self.reason})',
            f'download {official.url} in a browser, then run `timm-eca convert {official.file}`')


def convert_download(
        model: str,
        output: str | os.PathLike | None = None,
        tag: str | None = None,
        force: bool = False,
        use_ema: bool = True,
) -> Conversion:
    """Downloads the authors' checkpoint of a model, converts it with these arguments of `convert`, and removes it.

    If several processes do so at once, one downloads. The others wait, and then find the folder.

    Raises:
        DownloadError: Google Drive does not send the file.
        CheckpointError: There is no such model, or the folder exists or can't be written.
    """
    if model not in OFFICIAL:
        raise CheckpointError(
            f'The authors published no file for {printable(model)!r}', f'name one of {", ".join(OFFICIAL)}')
    check_tag(tag)
    official, downloads = OFFICIAL[model], weights_dir() / '.downloads'
    checkpoint = downloads / official.file
    folder = Path(output) if output else weights_dir() / f'{model}.{tag or TAG}'
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(downloads / f'{model}.lock'):
            if not force and os.path.lexists(folder):
                raise CheckpointError(f'{folder} exists', 'name another --output, or replace it with --force')
            try:
                _download(official, checkpoint)
                try:
                    content = read_checkpoint(checkpoint, use_ema)
                    identity = identify(content.state_dict, checkpoint)
                except CheckpointError as e:
                    raise DownloadError(official, e.problem) from e
                if identity.model != model or not identity.published:
                    raise DownloadError(official, f'it sent another checkpoint: {identity}')
                return convert(content, output, tag, force, provenance='downloaded')
            finally:
                checkpoint.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(
            f'{downloads} can\'t be written ({e.strerror or first_line(e)})',
            'make room, or set TIMM_ECA_HOME to another folder') from e


def _download(official: OfficialCheckpoint, path: Path) -> None:
    """Downloads a file with huggingface_hub's client, which knows the proxies and certificates."""
    _logger.info('Downloading %s from Google Drive (%s)', official.file, official.url)
    url = DRIVE_URL.format(official.drive_id)
    try:
        with get_session().stream('GET', url, follow_redirects=True, timeout=_SILENCE) as response:
            sender = response.url
            if sender.host != urlsplit(url).hostname and not (
                    sender.scheme == 'https' and sender.host.endswith(_GOOGLE)):
                raise DownloadError(official, f'it redirects to {sender.host}')
            if response.status_code != 200:
                raise DownloadError(official, f'HTTP {response.status_code}')
            with path.open('wb') as file:
                for chunk in tqdm(response.iter_bytes(1 << 20), desc=official.file, unit='MiB', disable=None):
                    file.write(chunk)
    except HUB_ERRORS as e:
        raise DownloadError(official, f'{type(e).__name__}: {first_line(e)}') from e
