"""Reads state dicts that `torch.save` wrote, running no code and taking no more memory than the file's size allows."""
import os
import zipfile
from pathlib import Path

import torch
from timm.models import load_state_dict

__all__ = ['ArchiveError', 'check_archive', 'load_pickled']


class ArchiveError(ValueError):
    """A damaged zip file, or one that `torch.save` did not write; the message completes "FILE is ..."."""


def check_archive(path: str | os.PathLike) -> None:
    """Raises an ArchiveError for a zip file that is damaged, or whose content is larger than the file.

    `torch.save` compresses nothing; torch would read compressed records, or several that share their bytes, all the
    same. Other files pass: `torch.load` tells whether they are of the older format.
    """
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':  # as torch tells them apart
            return
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:  # zipfile raises several kinds of errors
        raise ArchiveError(f'cut off or damaged (it has {size} bytes)') from None
    if not any(record.filename.endswith('/data.pkl') for record in records):
        raise ArchiveError('a zip archive that torch.save did not write')
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > size:
        raise ArchiveError('a zip archive whose content is larger than the file, which torch.save never writes')


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`, as timm reads it, by `torch.load(weights_only=True)`.

    Raises:
        Exception: What torch raises for a damaged file; an ArchiveError if the tensors are larger than twice the file.
    """
    check_archive(path)
    tensors = load_state_dict(str(path))
    if sum(value.nbytes for value in tensors.values()) > 2 * path.stat().st_size:  # a few may share memory
        raise ArchiveError('a file that is smaller than its tensors')
    return tensors
