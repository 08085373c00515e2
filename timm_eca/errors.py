"""What goes wrong with what comes from outside: one sentence that names the thing and the cure."""

__all__ = ['TimmEcaError', 'first_line', 'printable']


class TimmEcaError(Exception):
    """What all errors of this package are that bad input causes; commands end with exit status 2 for it."""


def printable(text: str, length: int = 80) -> str:
    """A text from outside, fit to be printed: cut to a length, and without control characters."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:length])


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of somebody else's error, fit to be printed, or its type where it says nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], length)
