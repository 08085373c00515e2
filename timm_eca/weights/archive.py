"""Looks at a file of `torch.save` before torch reads it, for what would take more memory than the file is large."""
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from timm.models import load_state_dict

__all__ = ['ArchiveError', 'check_archive', 'load_pickled']


_BYTES = ('builtins bytearray', '__builtin__ bytearray', 'builtins bytes', '__builtin__ bytes', '_codecs encode')


class ArchiveError(ValueError):
    """A zip file that `torch.save` did not write, or a damaged one; the error says which."""


def check_archive(path: str | os.PathLike) -> None:
    """Raises an ArchiveError unless a file of `torch.save` has its own size once it is read.

    `torch.save` compresses nothing. torch would read compressed records, or many that share their bytes, all the same;
    and what it allows pickles to make, in spite of `weights_only=True`, includes byte arrays of any length.
    """
    path = Path(path)
    with path.open('rb') as file:
        zipped = file.read(4) == b'PK\x03\x04'  # as torch decides it
    if zipped:
        _check_zip(path)
    if _makes_bytes(path, zipped):
        raise ArchiveError('a pickle that makes other than tensors, as no checkpoint does')


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`, as timm reads it, where it takes no more memory than twice the file.

    Raises:
        Exception: What torch raises for a damaged file; an ArchiveError where it takes more.
    """
    check_archive(path)
    tensors = load_state_dict(str(path))
    if sum(value.numel() * value.element_size() for value in tensors.values()) > 2 * path.stat().st_size:
        raise ArchiveError('its tensors are larger than the file')  # a few may share memory
    return tensors


def _makes_bytes(path: Path, zipped: bool) -> bool:
    """Whether a pickle calls what makes bytes. Damaged ones are torch's to refuse."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith('/data.pkl')]
                return any(_calls(pickletools.genops(archive.read(name))) for name in names)
        with path.open('rb') as file:  # the legacy format: magic number, version, system, content, names of storages
            return any(_calls(pickletools.genops(file)) for _ in range(5))
    except Exception:  # pickletools and zipfile raise several kinds of errors
        return False


def _calls(operations: Iterable[Any]) -> bool:
    return any(operation.name == 'GLOBAL' and argument in _BYTES for operation, argument, _ in operations)


def _check_zip(path: Path) -> None:
    try:
        with path.open('rb') as file:
            one_directory = _has_one_directory(file)
        records = zipfile.ZipFile(path).infolist() if one_directory else []
    except Exception:  # zipfile raises several kinds of errors
        one_directory = False
    if not one_directory:
        raise ArchiveError(f'cut off or damaged (it has {path.stat().st_size} bytes)')
    if not any(record.filename.endswith('/data.pkl') for record in records):
        raise ArchiveError('a zip archive that torch.save did not write')
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > path.stat().st_size:
        raise ArchiveError('a zip archive whose content is larger than the file, as torch.save writes none')


def _has_one_directory(file: IO[bytes]) -> bool:
    """Whether the list of contents is where its end says, right before it, at the end of the file.

    Readers look for it in different ways, Python's backwards from the end, torch's by the offset: here they agree.
    """
    end = file.seek(0, os.SEEK_END) - 22
    file.seek(max(0, end - 76))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b'PK\x05\x06' or tail[-2:] != b'\0\0':
        return False
    size, offset = struct.unpack('<LL', tail[-10:-2])
    if tail[-42:-38] == b'PK\x06\x07':  # of 64 bits
        end -= 76
        if len(tail) < 98 or tail[:4] != b'PK\x06\x06' or struct.unpack('<Q', tail[-34:-26])[0] != end:
            return False
        wide = struct.unpack('<QQ', tail[40:56])
        if any(narrow not in (2 ** 32 - 1, full) for narrow, full in zip((size, offset), wide)):
            return False
        size, offset = wide
    return offset + size == end
