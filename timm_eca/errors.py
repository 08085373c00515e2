"""What goes wrong with what comes from outside: one sentence that names the thing and the cure."""

__all__ = ['TimmEcaError', 'first_line']


class TimmEcaError(Exception):
    """What all errors of this package are that bad input causes; commands end with exit status 2 for it."""


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of somebody else's error, cut to a length, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
