"""Options, tables, progress and errors that several commands share."""
import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from timm_eca.errors import TimmEcaError, first_line

__all__ = [
    'add_image_arguments', 'add_model_arguments', 'needing', 'not_negative', 'positive', 'print_columns',
    'report_progress', 'report_unreadable', 'writing',
]

_REPORT_EVERY = 60  # seconds


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, and folders of them')
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load`, and `--batch-size`."""
    parser.add_argument(
        '-m', '--model', required=True, help='name of a registered model, a folder, or hf-hub:ORGANISATION/NAME')
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='weights to load into the model, e.g. model_best.pth.tar of timm\'s '
        'train.py (default: the pretrained weights)')
    parser.add_argument(
        '--no-ema', action='store_true',
        help='if the checkpoint has averaged weights (EMA), use the raw weights instead')
    parser.add_argument(
        '--img-size', type=positive, metavar='N', help='height and width of the images (default: the model\'s)')
    parser.add_argument('-b', '--batch-size', type=positive, default=32, help='images in a batch (default: 32)')
    parser.add_argument('--device', help='cpu, cuda, ... (default: cuda if there is a GPU, else cpu)')


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return number


def not_negative(text: str) -> int:
    return int(text) and positive(text)


def report_progress(batches: Iterable[tuple[Any, Any]], total: int) -> Iterator[tuple[Any, Any]]:
    """Passes batches of images and labels on, and prints a line a minute where no terminal shows a progress bar."""
    done, told = 0, time.monotonic()
    for images, labels in batches:
        yield images, labels
        done += len(images)
        if not sys.stderr.isatty() and time.monotonic() - told >= _REPORT_EVERY:
            told = time.monotonic()
            print(f'{done:,} of {total:,} images', file=sys.stderr)


def report_unreadable(unreadable: list[str]) -> int:
    """Names the files that can't be read, with the reasons, and returns the exit status."""
    for problem in unreadable:
        print(f'timm-eca: left out, can\'t be read: {problem}', file=sys.stderr)
    return 1 if unreadable else 0


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of equal length, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Turns the ImportError for one of the packages of the extra finetune into a TimmEcaError."""
    try:
        yield
    except ImportError as e:
        package = (e.name or '').partition('.')[0]
        if package not in packages:
            raise
        raise TimmEcaError(f'The package {package} is not installed', 'pip install \'timm_eca[finetune]\'') from e


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Turns an OSError into a TimmEcaError that names the output."""
    try:
        yield
    except OSError as e:
        raise TimmEcaError(
            f'{output} can\'t be written ({e.strerror or first_line(e)})', 'make room, or name another place') from e
