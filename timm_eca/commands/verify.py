"""`timm-eca verify`."""
import argparse

from timm_eca.conversion.verify import verify
from timm_eca.weights.hub import fetch_folder

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Checks the tensors of a folder against their recorded digests and the config, and with --checkpoint against '
        'the file that it was converted from. The card may be edited. The exit status is 1 if anything else changed.')
    parser.add_argument('folder', help='a folder that convert or finetune made, or hf-hub:ORGANISATION/NAME')
    parser.add_argument('--checkpoint', metavar='FILE', help='the file that it was converted from, e.g. the authors\'')


def run(args: argparse.Namespace) -> int:
    status = 0
    for check in verify(fetch_folder(args.folder), args.checkpoint):
        print(f'{"ok" if check.ok else "-" if check.ok is None else "WRONG":6}{check.what}')
        status = 1 if check.ok is False else status
    return status
