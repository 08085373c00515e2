"""`timm-eca export`."""
import argparse
from pathlib import Path

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Writes a model with ECA as a folder that timm loads without this package, e.g. as resnet50 with '
        "block_args={'attn_layer': 'eca'}. The logits stay equal, bit for bit. This works for some residual networks, "
        'if no ECA kernel is larger than the formula of the paper makes it.')
    parser.add_argument('folder', metavar='FOLDER', help='a folder that convert or finetune made')
    parser.add_argument('--output', metavar='DIR', required=True, help='the folder to make')
    parser.add_argument('--force', action='store_true', help='replace the folder if it exists')


def run(args: argparse.Namespace) -> int:
    from timm_eca.models.export import export_folder

    architecture = export_folder(Path(args.folder), Path(args.output), args.force)
    print(f'{args.output}: {architecture} with ECA, with the same logits, bit for bit')
    print(f'  use, without timm_eca: timm.create_model({f"local-dir:{args.output}"!r}, pretrained=True)')
    return 0
