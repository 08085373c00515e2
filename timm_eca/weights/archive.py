"""Checks archives of `torch.save` before torch reads them."""
import zipfile
from pathlib import Path

__all__ = ['ArchiveError', 'check_archive']


class ArchiveError(ValueError):
    """An archive that is larger inside than outside. The caller adds the name of the file."""


def check_archive(path: Path) -> None:
    """Raises an ArchiveError for a zip archive whose content is larger than the file.

    `torch.save` does not compress, but torch would read compressed content. Files of its older format pass. For a
    damaged archive, zipfile raises errors of its own.
    """
    with path.open('rb') as file:
        if file.read(4) != b'PK\x03\x04':  # as torch tells the formats apart
            return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ArchiveError('a zip archive whose content is larger than the file')
