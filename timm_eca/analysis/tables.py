"""Tables as CSV files."""
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_eca.weights.atomic import atomic_write

__all__ = ['write_csv']


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows, whole or not at all. The first row has the names of the columns."""
    def write(new: Path) -> None:
        with new.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
            csv.writer(file).writerows(rows)

    atomic_write(path, write)
