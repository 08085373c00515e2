"""`timm-eca convert`, which `convert_weights.py` is, too."""
import argparse
from pathlib import Path

from timm_eca.commands.push import add_push_to_hub, check_push, push_and_report
from timm_eca.conversion.convert import Conversion, convert
from timm_eca.conversion.download import download_checkpoint
from timm_eca.conversion.identify import describe
from timm_eca.weights.official import TAG

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Makes a folder with model.safetensors, config.json and a card of a checkpoint of the authors\' code. Without '
        '--output it goes to the weights directory ($TIMM_ECA_HOME), where pretrained=True looks first.')
    parser.add_argument('checkpoint', nargs='?', help='the file, e.g. eca_resnet50_k3557.pth.tar')
    parser.add_argument('--download', metavar='MODEL', help='download the authors\' file to this directory first')
    parser.add_argument('--official', action='store_true', help='you vouch that the file is the authors\' own')
    parser.add_argument('--no-ema', action='store_true', help='take the last weights, not their average (EMA)')
    parser.add_argument('--output', metavar='DIR', help='the folder to make')
    parser.add_argument('--tag', help='name of weights that are not the authors\' own')
    parser.add_argument('--force', action='store_true', help='replace the folder if it is there')
    parser.add_argument('--mean', type=float, nargs='+', help='means of the input channels, if not ImageNet\'s')
    parser.add_argument('--std', type=float, nargs='+', help='standard deviations of the input channels')
    add_push_to_hub(parser)


def run(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.download is None):
        args.parser.error('name either a CHECKPOINT or --download MODEL')
    check_push(args)
    checkpoint = download_checkpoint(args.download) if args.download else Path(args.checkpoint)
    done = convert(
        checkpoint, args.output, tag=args.tag, force=args.force, mean=args.mean, std=args.std, progress=True,
        provenance='downloaded' if args.download else 'vouched' if args.official else None, use_ema=not args.no_ema)
    _report(checkpoint, done, named=args.output is not None)
    return push_and_report(args, done.folder, args.push_to_hub) if args.push_to_hub else 0


def _report(checkpoint: Path, done: Conversion, named: bool) -> None:
    print(f'{checkpoint}: {describe(done.identity)}')
    print(f'  SHA-256 {done.sha256}')
    if done.part:
        print(f'  read: {done.part}')
    if done.left_out:
        print(f'  left out: {", ".join(done.left_out)}')
    if done.widened:
        print(f'  widened to float32: {", ".join(done.widened)}')
    print(f'  {done.tensors} tensors in {done.folder}, equal to the source bit for bit when loaded again')
    model = done.identity.model
    name = f'local-dir:{done.folder}' if named else model if done.tag == TAG else f'{model}.{done.tag}'
    print(f'  use: timm.create_model({name!r}, pretrained=True)')
