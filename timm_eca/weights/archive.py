"""Archives of `torch.save`, checked before torch reads them."""
import os
import zipfile
from pathlib import Path

__all__ = ['ArchiveError', 'check_archive']


class ArchiveError(ValueError):
    """An archive that is larger inside than outside. The message says so; the caller adds the file and the cure."""


def check_archive(path: Path) -> None:
    """Raises an ArchiveError for a zip archive whose content is larger than the file.

    `torch.save` compresses nothing, but torch would read what is compressed. Files of its older format pass.

    Raises:
        Exception: What zipfile raises for a damaged archive.
    """
    with path.open('rb') as file:
        if file.read(4) != b'PK\x03\x04':  # as torch tells them apart
            return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
            raise ArchiveError('a zip archive whose content is larger than the file')
