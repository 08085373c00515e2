"""`timm-eca verify`."""
import argparse

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Compares the tensors and config.json of a folder with the digests in model.safetensors, and with --checkpoint '
        'with the file that it was converted from. The card may be edited. The exit status is 1 if anything else '
        'changed. It can\'t see a change by somebody who recorded new digests: only --checkpoint shows that, or the '
        'SHA-256 that is printed, compared with one from a source that you trust.')
    parser.add_argument('folder', help='a folder that convert or finetune made, or hf-hub:ORGANISATION/NAME')
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='the file that it was converted from, e.g. the authors\' file')


def run(args: argparse.Namespace) -> int:
    from timm_eca.conversion.verify import verify
    from timm_eca.weights.hub import fetch_folder

    status = 0
    for check in verify(fetch_folder(args.folder), args.checkpoint):
        print(f'{"ok" if check.ok else "-" if check.ok is None else "WRONG":6}{check.what}')
        status = 1 if check.ok is False else status
    return status
