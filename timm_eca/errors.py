"""Errors for bad input: the problem in one sentence, then what the user can do."""
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ['ModelError', 'TimmEcaError', 'did_you_mean', 'first_line', 'printable']


class TimmEcaError(Exception):
    """The base of all errors that bad input causes in this package. A command ends with exit status 2 for it.

    Args:
        problem: One sentence on what is wrong, without a fix. It names the file where there is one.
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
    """A model, an attention or a checkpoint does not fit the arguments or the other."""


def printable(text: str, length: int = 80) -> str:
    """Makes a text from outside fit to print, without control characters.

    A text of more than `length` characters ends in ' ...', after its last whole word that fits.
    """
    if len(text) > length:
        head, _, last = text[:length + 1].rpartition(' ')
        # A single word that fills more than half of the line is cut itself.
        text = (head if len(last) <= length // 2 else text[:length]) + ' ...'
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of any error, fit to print, or the error's type if it has no message."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], length)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """': did you mean X, Y or Z?' with the known words that are close to a misspelt one, or '.' if none is."""
    *others, last = get_close_matches(word, known, cutoff=0.7) or ['']
    if not last:
        return '.'
    return f': did you mean {", ".join(others)} or {last}?' if others else f': did you mean {last}?'
