"""The command line: `timm-eca`, `python -m timm_eca` and `convert_weights.py`."""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from timm.models import create_model, get_arch_pretrained_cfgs, list_models

from timm_eca.card import render_card
from timm_eca.checkpoint import CheckpointError, Conversion, Identity, convert, describe, make_config
from timm_eca.download import download_checkpoint
from timm_eca.hub import HubError, check_repo_id, push_folder
from timm_eca.key_maps import kernel_sizes_of
from timm_eca.official import OFFICIAL, OFFICIAL_MODULES, TAG
from timm_eca.pretrained import WEIGHTS_FILE, WeightsNotFoundError, find_local_weights, hub_id, weights_dir
from timm_eca.version import __version__

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 0, or 2 with one sentence on stderr for bad input."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has had enough, e.g. `timm-eca list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there at exit
        return 1
    except (CheckpointError, HubError, WeightsNotFoundError) as e:
        print(f'{parser.prog}: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-eca', description='ECA-Net for timm.')
    parser.add_argument('--version', action='version', version=f'timm_eca {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    push = argparse.ArgumentParser(add_help=False)
    push.add_argument('--private', action='store_true', help='make a new repository a private one')
    push.add_argument('--revision', metavar='BRANCH', help='commit to this branch instead of main')
    push.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    push.add_argument('--dry-run', action='store_true', help='say what would be uploaded, and upload nothing')

    command = commands.add_parser(
        'convert', parents=[push], help='make a folder for timm and the Hub of a checkpoint of the authors\' code',
        description='Makes a folder with model.safetensors, config.json and a card of a checkpoint of the authors\' '
                    'code. Without --output it goes to the weights directory ($TIMM_ECA_HOME), where pretrained=True '
                    'looks first.')
    command.add_argument('checkpoint', nargs='?', help='the file, e.g. eca_resnet50_k3557.pth.tar')
    command.add_argument('--download', metavar='MODEL', help='download the authors\' file to this directory first')
    command.add_argument('--output', metavar='DIR', help='the folder to make')
    command.add_argument('--tag', help='name of weights that are not the authors\' own')
    command.add_argument('--force', action='store_true', help='replace the folder if it is there')
    command.add_argument('--mean', type=float, nargs='+', help='means of the input channels, if not ImageNet\'s')
    command.add_argument('--std', type=float, nargs='+', help='standard deviations of the input channels')
    command.add_argument('--push-to-hub', metavar='REPO_ID', help='then publish the folder, ORGANISATION/NAME')
    command.set_defaults(run=_convert, parser=command)

    command = commands.add_parser(
        'push', parents=[push], help='publish a folder on the Hugging Face Hub, in one commit',
        description='Uploads model.safetensors, config.json and README.md of a folder in one commit.')
    command.add_argument('folder', help='a folder that convert made')
    command.add_argument('repo_id', help='ORGANISATION/NAME')
    command.set_defaults(run=lambda args: _push(args, args.folder, args.repo_id))

    command = commands.add_parser('list', help='the models, and where their weights are')
    command.add_argument(
        'filter', nargs='?', default='', help='only these, among the twins of timm\'s models too, e.g. "eca_regnet*"')
    command.set_defaults(run=_list)

    command = commands.add_parser('cards', help='write the cards of the published models')
    command.add_argument('output', help='folder for <model>.<tag>.md')
    command.set_defaults(run=_cards)
    return parser


def _convert(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.download is None):
        args.parser.error('name either a CHECKPOINT or --download MODEL')
    if not args.push_to_hub and (args.private or args.revision or args.create_pr or args.dry_run):
        args.parser.error('--private, --revision, --create-pr and --dry-run go with --push-to-hub')
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    checkpoint = download_checkpoint(args.download) if args.download else Path(args.checkpoint)
    done = convert(
        checkpoint, args.output, tag=args.tag, force=args.force, mean=args.mean, std=args.std, progress=True)
    _report(checkpoint, done, named=args.output is not None)
    return _push(args, done.folder, args.push_to_hub) if args.push_to_hub else 0


def _report(checkpoint: Path, done: Conversion, named: bool) -> None:
    print(f'{checkpoint}: {describe(done.identity)}')
    if done.left_out:
        print(f'  left out: {", ".join(done.left_out)}')
    if done.widened:
        print(f'  widened to float32: {", ".join(done.widened)}')
    print(f'  {done.tensors} tensors in {done.folder}, equal to the source bit for bit when loaded again')
    model = done.identity.model
    name = f'local-dir:{done.folder}' if named else model if done.tag == TAG else f'{model}.{done.tag}'
    print(f'  use: timm.create_model({name!r}, pretrained=True)')


def _push(args: argparse.Namespace, folder: str | Path, repo_id: str) -> int:
    done = push_folder(folder, repo_id, args.private, args.revision, args.create_pr, args.dry_run)
    files = ', '.join(f'{name} ({size:,} bytes)' for name, size in done.files.items())
    if done.url is None:
        print(f'{done.repo_id}: would get {files}')
    elif done.changed:
        print(f'{done.repo_id}: {files} in {done.url}')
    else:
        print(f'{done.repo_id} has these files already, no commit made')
    return 0


def _list(args: argparse.Namespace) -> int:
    rows = [('model', 'parameters', 'kernel sizes', 'top-1', 'top-5', 'weights')]
    for model in list_models(args.filter, module=[*OFFICIAL_MODULES, *(['eca_twins'] if args.filter else [])]):
        described = _describe(model)
        registered = get_arch_pretrained_cfgs(model)
        for name, cfg in registered.items():
            published = cfg.tag == TAG
            reported = (f'{OFFICIAL[model].top1:.2f}', f'{OFFICIAL[model].top5:.2f}') if published else ('', '')
            rows.append((name, *described, *reported, _where(name, cfg.hf_hub_id)))
        for folder in sorted(weights_dir().glob(f'{model}.*')):
            if folder.is_dir() and folder.name not in registered:
                try:
                    rows.append((folder.name, *_describe(folder.name), '', '', _where(folder.name, None)))
                except Exception as e:  # whatever is in somebody's folder, the others are listed
                    rows.append((folder.name, '', '', '', '', f'damaged: {str(e).strip().splitlines()[0][:200]}'))
    if len(rows) == 1:
        print(f'timm-eca: no model is called {args.filter}', file=sys.stderr)
        return 2
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print('Accuracies on ImageNet-1k in percent, reported by the authors.')
    return 0


def _describe(name: str) -> tuple[str, str]:
    network = create_model(name, device='meta')
    params = sum(p.numel() for p in network.parameters())
    return f'{params:,}', ','.join(map(str, kernel_sizes_of(network.state_dict())))


def _where(name: str, repo_id: str | None) -> str:
    """Where the weights are, or how to get them."""
    try:
        if find_local_weights(name):
            return 'converted'
    except WeightsNotFoundError as e:
        return f'damaged: {e}'
    model, _, tag = name.partition('.')
    repo_id = hub_id(name) if tag == TAG else repo_id
    if repo_id and isinstance(try_to_load_from_cache(repo_id, WEIGHTS_FILE), str):
        return f'in the Hub\'s cache, {repo_id}'
    if tag == TAG:
        return f'timm-eca convert {OFFICIAL[model].file}'
    return f'warm start from {repo_id}' if repo_id else 'none'


def _cards(args: argparse.Namespace) -> int:
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for model, official in OFFICIAL.items():
        config = make_config(Identity(model, official.kernel_sizes, 1000, 3), TAG)
        (output / f'{model}.{TAG}.md').write_text(render_card(model, TAG, config), encoding='utf-8')
    return 0
