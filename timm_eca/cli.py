"""The command line: `timm-eca`, `python -m timm_eca` and `convert_weights.py`."""
import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import tqdm
from timm.models import create_model, get_arch_pretrained_cfgs, list_models

from timm_eca.allocator import keep_freed_memory
from timm_eca.card import render_card
from timm_eca.checkpoint import Conversion, Identity, convert, describe, make_config
from timm_eca.download import download_checkpoint
from timm_eca.errors import TimmEcaError, first_line, show
from timm_eca.finetune_settings import Settings, flag
from timm_eca.folder import WEIGHTS_FILE
from timm_eca.gates_report import collect_gates, draw_gates, write_gates
from timm_eca.hub import check_repo_id, fetch_folder, push_folder
from timm_eca.hub_client import limit_waiting
from timm_eca.images import ImageError, find_images
from timm_eca.key_maps import kernel_sizes_of
from timm_eca.new_folder import write_whole
from timm_eca.official import OFFICIAL, OFFICIAL_MODULES, TAG
from timm_eca.predict import ModelError, class_names, load_model, predict
from timm_eca.pretrained import WeightsNotFoundError, find_local_weights, hub_id, weights_dir
from timm_eca.run import RunError, run
from timm_eca.verify import verify
from timm_eca.version import __version__

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 0, or 2 with one sentence on stderr for bad input."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ['run'] and arguments[1:] not in ([], ['-h'], ['--help']):
        # What follows is somebody else's: its options, and what it raises.
        try:
            return run(arguments[1:])
        except RunError as e:
            print(f'timm-eca: {e}', file=sys.stderr)
            return 2
    parser = _make_parser()
    args = parser.parse_args(arguments)
    limit_waiting()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # the names of files may be of any bytes
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has had enough, e.g. `timm-eca list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there at exit
        return 1
    except TimmEcaError as e:
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

    push_after = argparse.ArgumentParser(add_help=False, parents=[push])
    push_after.add_argument('--push-to-hub', metavar='REPO_ID', help='then publish the folder, ORGANISATION/NAME')

    command = commands.add_parser(
        'convert', parents=[push_after],
        help='make a folder for timm and the Hub of a checkpoint of the authors\' code',
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

    command = commands.add_parser(
        'run', help='run a script with the models registered', usage='timm-eca run [-m] SCRIPT [ARGUMENT ...]',
        description='Runs any Python script, or a module after -m, as if it had imported timm_eca: timm\'s train.py, '
                    'validate.py, benchmark.py and onnx_export.py, examples of transformers, your own. It goes below '
                    'torchrun and accelerate launch: torchrun --nproc-per-node 2 -m timm_eca run train.py ...')
    command.add_argument('script', help='the script, or -m and the module')
    command.add_argument('arguments', nargs='*', help='its arguments')

    command = commands.add_parser(
        'finetune', parents=[push_after], help='train a model on images, and make a folder for timm and the Hub of it',
        description='Trains a model on a folder of images by class (or by split and class), on a dataset that timm '
                    'knows (hfds/..., wds/..., torch/...), or on "digits", scikit-learn\'s 1,797 digits of 8x8 pixels. '
                    'The same command below accelerate launch or torchrun (-m timm_eca finetune ...) uses several '
                    'processes. It needs the extra finetune.')
    command.add_argument(
        'data', nargs='?', default='digits', help='a folder, the name of a dataset, or digits (the default)')
    groups: dict[str, Any] = {}
    for option in fields(Settings)[1:]:
        title = option.metadata['group']
        if title not in groups:
            groups[title] = command.add_argument_group(title)
        _add_option(groups[title], option)
    command.set_defaults(run=_finetune, parser=command)

    images = argparse.ArgumentParser(add_help=False)
    images.add_argument('images', nargs='+', metavar='IMAGE', help='image files, and folders of them')
    images.add_argument(
        '--model', required=True, help='name of a registered model, a folder, or hf-hub:ORGANISATION/NAME')
    images.add_argument('--batch-size', type=_positive, default=32, help='images at a time (default: 32)')
    images.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')

    command = commands.add_parser(
        'predict', parents=[images], help='classify images',
        description='Prints the most probable classes of images. Files that can\'t be read are reported and left out, '
                    'and the exit status is 1.')
    command.add_argument('--topk', type=_positive, default=5, help='classes of each image (default: 5)')
    command.add_argument('--json', action='store_true', help='print JSON')
    command.set_defaults(run=_predict)

    command = commands.add_parser(
        'gates', parents=[images], help='the channel weights that ECA computes, by block',
        description='Prints what the gates of each ECA layer are over images, and with --output writes them: '
                    'gates.safetensors of each image, gates.csv and gates.png with the means over the images of each '
                    'folder, as in the paper\'s figure of channel weights (the figure needs the extra plot).')
    command.add_argument('--output', metavar='DIR', help='folder for the files')
    command.set_defaults(run=_gates)

    command = commands.add_parser(
        'verify', help='check that a folder is what it says',
        description='Checks the tensors of a folder against their recorded digests, its config and its card, and with '
                    '--checkpoint against the file that it was converted from. The exit status is 1 where something is '
                    'not as it was written.')
    command.add_argument('folder', help='a folder that convert or finetune made, or hf-hub:ORGANISATION/NAME')
    command.add_argument('--checkpoint', metavar='FILE', help='the file that it was converted from, e.g. the authors\'')
    command.set_defaults(run=_verify)

    command = commands.add_parser('cards', help='write the cards of the published models')
    command.add_argument('output', help='folder for <model>.<tag>.md')
    command.set_defaults(run=_cards)
    return parser


def _add_option(group: Any, option: Field) -> None:
    """Adds the option of a setting: its name, type and default are the setting's."""
    name, help = flag(option.name), option.metadata['help'].replace('%', '%%')
    if option.type is bool:
        group.add_argument(
            f'--no-{name[2:]}' if option.default else name, dest=option.name, default=option.default,
            action='store_false' if option.default else 'store_true', help=help)
        return
    kind = str(option.type)
    if option.default not in (None, ''):
        help += f' (default: {option.default})'
    group.add_argument(
        name, type=float if 'float' in kind else int if 'int' in kind else str, default=option.default, help=help,
        nargs='+' if 'tuple' in kind else None, required=option.name == 'model', metavar=option.metadata['metavar'],
        choices=option.metadata['choices'])


def _finetune(args: argparse.Namespace) -> int:
    _check_push(args)
    try:
        from timm_eca.finetune import finetune
    except ImportError as e:
        raise TimmEcaError(f'Fine-tuning needs {e.name}: pip install \'timm_eca[finetune]\'.') from None
    keep_freed_memory()
    values: dict[str, Any] = {option.name: getattr(args, option.name) for option in fields(Settings)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    done = finetune(Settings(**values))
    if os.environ.get('RANK', '0') != '0':
        return 0
    print(f'{done.folder}: top-1 {done.best["top1"]:.2f} %, top-5 {done.best["top5"]:.2f} %, of epoch '
          f'{done.best["epoch"]:.0f}')
    print(f'  use: timm.create_model({f"local-dir:{done.folder}"!r}, pretrained=True)')
    return _push(args, done.folder, args.push_to_hub) if args.push_to_hub else 0


def _check_push(args: argparse.Namespace) -> None:
    if not args.push_to_hub and (args.private or args.revision or args.create_pr or args.dry_run):
        args.parser.error('--private, --revision, --create-pr and --dry-run go with --push-to-hub')
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)


def _convert(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.download is None):
        args.parser.error('name either a CHECKPOINT or --download MODEL')
    _check_push(args)
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
                    rows.append((folder.name, '', '', '', '', f'damaged: {first_line(e, 200)}'))
    if len(rows) == 1:
        print(f'timm-eca: no model is called {args.filter}', file=sys.stderr)
        return 2
    _print_columns(rows)
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return number


def _load(args: argparse.Namespace) -> nn.Module:
    model = load_model(args.model)
    try:
        return model.to(args.device)
    except (RuntimeError, AssertionError) as e:  # torch's words for a device that isn't there
        raise ModelError(f'the device {args.device} can\'t be used ({first_line(e)}): choose cpu.') from None


def _report_unreadable(unreadable: list[tuple[Path, str]]) -> int:
    for path, reason in unreadable:
        print(f'timm-eca: {path} is left out, it can\'t be read: {reason}', file=sys.stderr)
    return 1 if unreadable else 0


def _predict(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    model = _load(args)
    names = class_names(model)
    unreadable: list[tuple[Path, str]] = []
    progress = tqdm(total=len(paths), leave=False, disable=None if len(paths) > 1 else True)
    count = 0
    for prediction in predict(model, paths, unreadable, args.topk, args.batch_size):
        best = [
            {'class': index, 'name': names[index], 'probability': round(probability, 6)}
            for index, probability in zip(prediction.classes, prediction.probabilities)
        ]
        with progress.external_write_mode():
            if args.json:
                print('[' if count == 0 else ',')
                print(json.dumps({'image': str(prediction.path), 'predictions': best}, ensure_ascii=False), end='')
            else:
                print(prediction.path)
                for row in best:
                    print(f'  {row["probability"]:8.2%}  {show(str(row["name"]), 200)}')
        count += 1
        progress.update()
    progress.close()
    if args.json:
        print('\n]' if count else '[]')
    return _report_unreadable(unreadable)


def _gates(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    model = _load(args)
    unreadable: list[tuple[Path, str]] = []
    with tqdm(paths, leave=False, disable=None) as progress:
        try:
            collected, read = collect_gates(model, progress, unreadable, args.batch_size)
        except ValueError as e:
            raise ModelError(f'{args.model}: {e}') from None
    rows: list[tuple[str, ...]] = [('layer', 'channels', 'mean', 'lowest', 'highest', 'deviation between images')]
    for name, values in collected.items():
        spread = values.std(0, correction=0).mean()
        rows.append((name, str(values.shape[1]), *(f'{v:.4f}' for v in (
            values.mean(), values.mean(0).min(), values.mean(0).max(), spread))))
    if read:
        _print_columns(rows)
    if args.output and read:
        with _writing(args.output):
            for path in write_gates(Path(args.output), collected, read):
                print(path)
            try:
                print(draw_gates(Path(args.output) / 'gates.png', collected, read))
            except ImportError:
                raise ImageError(
                    'the figure needs matplotlib, the other files are written: pip install \'timm_eca[plot]\'.'
                ) from None
    return _report_unreadable(unreadable)


def _verify(args: argparse.Namespace) -> int:
    status = 0
    for check in verify(fetch_folder(args.folder), args.checkpoint):
        print(f'{"ok" if check.ok else "-" if check.ok is None else "WRONG":6}{check.what}')
        status = 1 if check.ok is False else status
    return status


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _cards(args: argparse.Namespace) -> int:
    output = Path(args.output)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for model, official in OFFICIAL.items():
            card = render_card(model, TAG, make_config(Identity(model, official.kernel_sizes, 1000, 3), TAG))
            write_whole(output / f'{model}.{TAG}.md', partial(Path.write_text, data=card, encoding='utf-8'))
    return 0


@contextmanager
def _writing(output: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise TimmEcaError(
            f'{output} can\'t be written ({e.strerror or first_line(e)}): make room, or name another folder.') from None
