"""`timm-eca finetune`."""
import argparse
import os
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from timm_eca.commands.process import keep_freed_memory
from timm_eca.commands.push import push_and_report
from timm_eca.errors import TimmEcaError
from timm_eca.finetune.settings import Settings
from timm_eca.weights.hub import check_repo_id

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Trains a model on a folder of images by class (or by split and class), on a dataset of the Hub (hfds/NAME), '
        'or on "digits", scikit-learn\'s 1,797 digits of 8x8 pixels. A run that was stopped goes on with the same '
        'command. Works under accelerate launch and torchrun (-m timm_eca finetune ...). Needs the extra finetune.')
    parser.add_argument('data', metavar='DATA', help='a folder, hfds/NAME, or digits')
    parser.add_argument('--push-to-hub', metavar='REPO_ID', help='then publish the folder as ORGANISATION/NAME')
    groups: dict[str, Any] = {}
    hints = get_type_hints(Settings)
    for option in fields(Settings)[1:]:
        title = option.metadata['group']
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], option, hints[option.name])


def _add_option(group: Any, option: Field, hint: Any) -> None:
    """Adds the option of a setting. One that isn't given is not among the parsed arguments."""
    name, details = '--' + option.name.replace('_', '-'), dict(option.metadata)
    common: dict[str, Any] = {'dest': option.name, 'default': argparse.SUPPRESS}
    common['help'] = details['help'].replace('%', '%%')
    if hint is bool:
        action = 'store_false' if option.default else 'store_true'
        group.add_argument(f'--no-{name[2:]}' if option.default else name, action=action, **common)
        return
    if get_origin(hint) is UnionType:
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple:
        hint, common['nargs'] = get_args(hint)[0], '+'
    if isinstance(option.default, str | int | float | tuple):
        common['help'] += f' (default: {option.default})'
    group.add_argument(
        *([details['short']] if 'short' in details else []), name, type=hint, required=option.name == 'model',
        metavar=details.get('metavar'), choices=details.get('choices'), **common)


def run(args: argparse.Namespace) -> int:
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    try:
        from timm_eca.finetune.run import finetune
    except ImportError as e:
        raise TimmEcaError(f'Fine-tuning needs {e.name}: pip install \'timm_eca[finetune]\'.') from None
    keep_freed_memory()
    given = {option.name: getattr(args, option.name) for option in fields(Settings) if hasattr(args, option.name)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    done = finetune(Settings.suited(**given))
    if os.environ.get('RANK', '0') != '0':
        return 0
    top5 = f', top-5 {done.best["top5"]:.2f} %' if 'top5' in done.best else ''
    print(f'{done.folder}: top-1 {done.best["top1"]:.2f} %{top5}, of epoch {done.best["epoch"]:.0f}')
    print(f'  use: timm.create_model({f"local-dir:{done.folder}"!r}, pretrained=True)')
    return push_and_report(done.folder, args.push_to_hub) if args.push_to_hub else 0
