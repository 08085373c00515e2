"""Tables on a terminal."""
from collections.abc import Sequence

__all__ = ['print_columns']


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of equal length, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
