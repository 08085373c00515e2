"""The error for files that can't be written."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_eca.errors import TimmEcaError, first_line

__all__ = ['writing']


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Turns an OSError into a TimmEcaError that names the output folder and the cure."""
    try:
        yield
    except OSError as e:
        raise TimmEcaError(
            f'{output} can\'t be written ({e.strerror or first_line(e)}): make room, or name another folder.') from None
