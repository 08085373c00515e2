"""Writes a folder or a file beside its place and renames it: it is there whole or not at all."""
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ['atomic_write', 'new_folder']


@contextmanager
def new_folder(folder: Path, replace: bool, files: Collection[str]) -> Iterator[Path]:
    """A folder to write in, beside its place. It is moved to the place at the end, or removed after an exception.

    Nothing is removed but what this call wrote, and the folder that it replaced. A process that is killed may leave
    `.<name>.timm_eca-<number>.new` behind, and the folder that it was about to replace as `....old`.

    Args:
        folder: The place.
        replace: Replace a folder that is there, if it has no other files than these.
        files: Names of the files that such a folder may have.

    Raises:
        FileExistsError: There is a folder already that is not to be replaced, or something else.
        OSError: It can't be written.
    """
    _check_replaceable(folder, replace, files)
    made = [parent for parent in folder.parents if not parent.exists()]
    new = _beside(folder, '.new')
    old = new.with_suffix('.old')
    try:
        new.mkdir(parents=True)
        yield new
        _check_replaceable(folder, replace, files)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place, and renames it when it is whole.

    Args:
        path: The place. A file that is there is replaced.
        write: Writes the file whose path it is given.

    Raises:
        OSError: It can't be written.
    """
    new = _beside(path, path.suffix)  # which tells some writers the format
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f'.{path.name}.timm_eca-{secrets.token_hex(4)}{suffix}')


def _check_replaceable(folder: Path, replace: bool, files: Collection[str]) -> None:
    if not os.path.lexists(folder):
        return
    if not replace:
        raise FileExistsError(f'{folder} exists')
    if not folder.is_dir() or folder.is_symlink() or {entry.name for entry in folder.iterdir()} - set(files):
        raise FileExistsError(f'{folder} is not a folder that was converted before (it has other files)')
