"""Writes a folder or a file whole or not at all: beside its place first, then renames it."""
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
    """Makes a folder beside its place. Moves it to the place at the end, or removes it after an exception.

    With `replace`, it replaces a folder that has no other files than `files`. It removes nothing else. A process that
    is killed may leave `.<name>.timm_eca-<number>.new` behind, and the folder that it was about to replace as
    `....old`.

    Raises:
        FileExistsError: The place is taken, and may not be replaced.
        OSError: The folder can't be written.
    """
    _check_place(folder, replace, files)
    made = [parent for parent in folder.parents if not parent.exists()]
    new = _beside(folder, '.new')
    old = new.with_suffix('.old')
    try:
        new.mkdir(parents=True)
        yield new
        _check_place(folder, replace, files)  # another process may have written there
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
    """Writes a file beside its place, then renames it. An existing file is replaced.

    `write` gets the path of a new file with the same suffix. An OSError means that the file can't be written.
    """
    new = _beside(path, path.suffix)
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f'.{path.name}.timm_eca-{secrets.token_hex(4)}{suffix}')


def _check_place(folder: Path, replace: bool, files: Collection[str]) -> None:
    if not os.path.lexists(folder):
        return
    if not replace:
        raise FileExistsError(f'{folder} exists')
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f'{folder} is a link or a file, not a folder')
    others = sorted({entry.name for entry in folder.iterdir()} - set(files))
    if others:
        raise FileExistsError(f'{folder} has other files than a converted folder, {others[0]!r} the first of them')
