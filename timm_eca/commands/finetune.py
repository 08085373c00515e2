"""`timm-eca finetune`."""
import argparse
import os
from dataclasses import Field, fields
from typing import Any

from timm_eca.commands.allocator import keep_freed_memory
from timm_eca.commands.push import add_push_to_hub, check_push, push_and_report
from timm_eca.errors import TimmEcaError
from timm_eca.finetune.settings import Settings, flag

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Trains a model on a folder of images by class (or by split and class), on a dataset that timm knows '
        '(hfds/..., wds/..., torch/...), or on "digits", scikit-learn\'s 1,797 digits of 8x8 pixels. The same command '
        'below accelerate launch or torchrun (-m timm_eca finetune ...) uses several processes. It needs the extra '
        'finetune.')
    parser.add_argument(
        'data', nargs='?', default='digits', help='a folder, the name of a dataset, or digits (the default)')
    add_push_to_hub(parser)
    groups: dict[str, Any] = {}
    for option in fields(Settings)[1:]:
        title = option.metadata['group']
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], option)


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


def run(args: argparse.Namespace) -> int:
    check_push(args)
    try:
        from timm_eca.finetune.run import finetune
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
    return push_and_report(done.folder, args.push_to_hub) if args.push_to_hub else 0
