"""What several commands take from the command line and print: options, the model, tables, and errors about files."""
import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from timm_eca.analysis.predict import ModelError, load_model
from timm_eca.errors import TimmEcaError, first_line

__all__ = [
    'add_image_arguments', 'add_model_arguments', 'load', 'not_negative', 'positive', 'print_columns',
    'report_unreadable', 'writing',
]


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, and folders of them')
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', required=True, help='name of a registered model, a folder, or hf-hub:ORGANISATION/NAME')
    parser.add_argument('-b', '--batch-size', type=positive, default=32, help='images at a time (default: 32)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return number


def not_negative(text: str) -> int:
    return int(text) and positive(text)


def load(args: argparse.Namespace) -> nn.Module:
    model = load_model(args.model)
    try:
        return model.to(args.device)
    except (RuntimeError, AssertionError) as e:  # torch raises either for an absent device
        raise ModelError(f'the device {args.device} can\'t be used ({first_line(e)}): choose cpu.') from None


def report_unreadable(unreadable: list[str]) -> int:
    """Names the files that were left out, and why, and returns the exit status."""
    for problem in unreadable:
        print(f'timm-eca: left out, can\'t be read: {problem}', file=sys.stderr)
    if len(unreadable) > 1:
        print(f'timm-eca: {len(unreadable)} files could not be read.', file=sys.stderr)
    return 1 if unreadable else 0


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of equal length, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Turns an OSError into a TimmEcaError that names the output folder and the cure."""
    try:
        yield
    except OSError as e:
        raise TimmEcaError(
            f'{output} can\'t be written ({e.strerror or first_line(e)}): make room, or name another folder.') from None
