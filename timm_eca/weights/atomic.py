"""Writes a folder, or a file, so that it is there whole or not at all, whatever happens to the process."""
import errno
import glob
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left is not cleaned up there
    fcntl = None  # type: ignore[assignment]

__all__ = ['new_folder', 'atomic_write']


@contextmanager
def new_folder(folder: Path, replace: bool, files: Collection[str]) -> Iterator[Path]:
    """A folder to write in, beside its place, that takes the place when all went well and leaves nothing otherwise.

    What a process that was killed left beside the place is removed, and a folder that it was about to replace put back.

    Args:
        folder: The place.
        replace: Replace a folder that is there, if it has no other files than these.
        files: Names of the files that such a folder may have.

    Raises:
        FileExistsError: There is a folder already, and it is not to be replaced, or something else.
        OSError: It can't be written.
    """
    _clean_up(folder)
    _check_replaceable(folder, replace, files)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder.parent)) from None
        new, lock = _make(folder)
        old, replaced = new.with_suffix('.old'), None
        try:
            yield new
            _check_replaceable(folder, replace, files)
            if folder.exists():
                if fcntl:
                    replaced = os.open(folder, os.O_RDONLY)
                    _lock(replaced)  # nobody is to put it back while it is away
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
            if replaced is not None:
                os.close(replaced)
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place, and puts it there when it is whole. What a killed process left there is removed.

    Args:
        path: The place. What is there is replaced.
        write: Writes the file that it is given.

    Raises:
        OSError: It can't be written.
    """
    for left in path.parent.glob(f'.{glob.escape(path.stem)}.*.new{path.suffix}'):
        writer = left.name.removeprefix(f'.{path.stem}.').partition('-')[0]
        if fcntl and writer.isdecimal() and not _lives(int(writer)):
            left.unlink(missing_ok=True)
    new = path.with_name(f'.{path.stem}.{os.getpid()}-{threading.get_ident()}.new{path.suffix}')
    try:
        write(new)
        os.replace(new, path)
    except SafetensorError as e:
        raise OSError(str(e)) from None
    finally:
        new.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _check_replaceable(folder: Path, replace: bool, files: Collection[str]) -> None:
    if not os.path.lexists(folder):
        return
    if not replace:
        raise FileExistsError(f'{folder} exists')
    if not folder.is_dir() or folder.is_symlink() or {entry.name for entry in folder.iterdir()} - set(files):
        raise FileExistsError(f'{folder} is not a folder that was converted before (it has other files)')


def _make(folder: Path) -> tuple[Path, int]:
    """A new folder beside a place, and what keeps it from being taken for a dead process's."""
    while True:
        new = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}.new')
        new.mkdir()
        lock = os.open(new, os.O_RDONLY) if fcntl else os.open(os.devnull, os.O_RDONLY)
        if _lock(lock) and new.exists():
            return new, lock
        os.close(lock)  # somebody took it for one in the moment before


def _lock(descriptor: int) -> bool:
    """Takes a lock that ends with the process."""
    if not fcntl:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clean_up(folder: Path) -> None:
    if not fcntl or not folder.parent.is_dir():
        return
    for left in folder.parent.glob(f'.{glob.escape(folder.name)}.*'):
        if left.suffix not in ('.new', '.old') or len(left.stem) != len(folder.name) + 10 or left.is_symlink():
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            if not _lock(descriptor):  # its process lives
                continue
            if left.suffix == '.old' and not os.path.lexists(folder):
                left.rename(folder)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)
