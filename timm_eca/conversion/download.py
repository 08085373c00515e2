"""Fetches the authors' checkpoints from Google Drive, with `gdown` (extra `download`)."""
import os
from pathlib import Path

from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import first_line
from timm_eca.weights.official import OFFICIAL

__all__ = ['download_checkpoint']


def download_checkpoint(model: str, folder: str | os.PathLike = '.', progress: bool = True) -> Path:
    """Downloads the authors' file of a published model, and returns its path.

    Args:
        model: Name of the model.
        folder: Where the file goes to, under the authors' name.
        progress: Show a progress bar.

    Raises:
        CheckpointError: There is no such model, gdown is not installed, the file exists, or Drive doesn't send it.
    """
    if model not in OFFICIAL:
        raise CheckpointError(f'The authors published no file for {model!r}: there are {", ".join(OFFICIAL)}.')
    official = OFFICIAL[model]
    path = Path(folder) / official.file
    if path.exists():
        raise CheckpointError(f'{path} exists: convert it with `timm-eca convert {path}`, or remove it.')
    try:
        import gdown
    except ImportError:
        raise CheckpointError(
            f'Downloading needs gdown: pip install gdown, or download {official.url} in a browser and '
            'convert that file.') from None
    try:
        done = gdown.download(id=official.drive_id, output=str(path), quiet=not progress)
    except Exception as e:  # gdown raises its own errors, requests' and OSErrors
        raise CheckpointError(
            f'Google Drive did not send {official.file} ({first_line(e, 200)}): try later, or download {official.url} '
            'in a browser and convert that file.') from None
    if not done or not path.is_file():
        raise CheckpointError(f'Google Drive did not send {official.file}: download {official.url} in a browser.')
    return path
