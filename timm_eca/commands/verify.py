"""`timm-eca verify`."""
import argparse

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Compares the tensors and config.json of a folder with the digests in model.safetensors. With --checkpoint it '
        'also compares the tensors with the file that the folder was converted from. The exit status is 1 if anything '
        'but the card has changed. Whoever changes the file can also change its digests. To rule that out, use '
        '--checkpoint, or compare the printed SHA-256 with one from a source you trust.')
    parser.add_argument('folder', help='a folder that convert or finetune made, or hf-hub:ORGANISATION/NAME')
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='the file that the folder was converted from')


def run(args: argparse.Namespace) -> int:
    from timm_eca.conversion.verify import verify
    from timm_eca.weights.hub import fetch_folder

    status = 0
    for check in verify(fetch_folder(args.folder), args.checkpoint):
        print(f'{"ok" if check.ok else "-" if check.ok is None else "WRONG":6}{check.what}')
        status = 1 if check.ok is False else status
    return status
