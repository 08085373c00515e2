"""What the commands that run a model on images share: options, the model, and files that can't be read."""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn

from timm_eca.analysis.predict import ModelError, load_model
from timm_eca.errors import first_line

__all__ = ['add_image_arguments', 'add_model_arguments', 'load', 'positive', 'report_unreadable']


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


def load(args: argparse.Namespace) -> nn.Module:
    model = load_model(args.model)
    try:
        return model.to(args.device)
    except (RuntimeError, AssertionError) as e:  # torch raises either for an absent device
        raise ModelError(f'the device {args.device} can\'t be used ({first_line(e)}): choose cpu.') from None


def report_unreadable(unreadable: list[tuple[Path, str]]) -> int:
    for path, reason in unreadable:
        print(f'timm-eca: {path} is left out, it can\'t be read: {reason}', file=sys.stderr)
    if len(unreadable) > 1:
        print(f'timm-eca: {len(unreadable)} files could not be read.', file=sys.stderr)
    return 1 if unreadable else 0
