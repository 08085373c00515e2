"""Looks at a zip file of `torch.save` before torch reads it, for what would take more memory than the file is large."""
import os
import zipfile
from pathlib import Path

__all__ = ['ArchiveError', 'check_archive']


class ArchiveError(ValueError):
    """A zip file that `torch.save` did not write, or a damaged one; the error says which."""


def check_archive(path: str | os.PathLike) -> None:
    """Raises an ArchiveError unless a zip file has the structure of a checkpoint, and its own size once it is read.

    `torch.save` compresses nothing. torch would read compressed records, or many that share their bytes, all the same.
    """
    path = Path(path)
    try:
        records = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else None
    except Exception:  # zipfile raises several kinds of errors
        records = None
    if records is None:
        raise ArchiveError(f'cut off or damaged (it has {path.stat().st_size} bytes)')
    if not any(record.filename.endswith('/data.pkl') for record in records):
        raise ArchiveError('a zip archive that torch.save did not write')
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > path.stat().st_size:
        raise ArchiveError('a zip archive whose content is larger than the file, as torch.save writes none')
