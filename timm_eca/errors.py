"""Errors for bad input: the problem in one sentence, then what the user can do."""
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ['ModelError', 'TimmEcaError', 'did_you_mean', 'first_line', 'printable']


class TimmEcaError(Exception):
    """The base of all errors that bad input causes in this package. A command ends with exit status 2 for it.

    Args:
        problem: One sentence on what is wrong, without a fix. It names the file if there is one.
        *fixes: What the user can do, the likeliest first. One fix follows the problem, several stand in lines below.
    """

    def __init__(self, problem: str, *fixes: str) -> None:
        self.problem = problem
        self.fixes = fixes
        if len(fixes) == 1:
            super().__init__(f'{problem}: {fixes[0]}.')
        else:
            super().__init__('\n'.join([problem, *(f'  - {fix}' for fix in fixes)]))


class ModelError(TimmEcaError, ValueError):
    """A model, its arguments and a checkpoint do not fit together."""


def printable(text: str, length: int = 80) -> str:
    """Makes a text from outside fit to print: `length` characters at most, and escaped control characters."""
    text = text if len(text) <= length else f'{text[:length].rstrip()} ...'
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of any error, fit to print, or the error's type if it has no message."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], length)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """': did you mean X or Y?' with the known words that are close to a misspelt one, or '.' if none is."""
    close = get_close_matches(word, known, cutoff=0.7)
    return f': did you mean {" or ".join(close)}?' if close else '.'
