"""`timm-eca finetune`."""
import argparse
import os
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from timm_eca.commands.console import needing
from timm_eca.commands.process import keep_freed_memory
from timm_eca.commands.push import push_and_report
from timm_eca.finetune.settings import Settings, flag

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Trains a model on a folder of images by class (or by split and class), on a dataset of the Hub (hfds/NAME), '
        'or on "digits", scikit-learn\'s 1,797 digits of 8x8 pixels. If a run was stopped, the same command continues '
        'it. Works under accelerate launch and torchrun (-m timm_eca finetune ...). Needs the extra finetune.')
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
    """Adds the option of a setting. The parsed arguments have only the options that were given."""
    name, default, details = flag(option.name), option.default, option.metadata
    common: dict[str, Any] = {'dest': option.name, 'default': argparse.SUPPRESS, 'help': details['help']}
    if hint is bool:
        negative = f'--no-{name[2:]}'
        group.add_argument(negative if default else name, action='store_false' if default else 'store_true', **common)
        return
    while get_args(hint):  # float | None, tuple[float, ...]
        hint = get_args(hint)[0]
    if '(default:' not in details['help'] and isinstance(default, str | int | float | tuple):
        common['help'] += f' (default: {" ".join(map(str, default)) if isinstance(default, tuple) else default})'
    common |= {key: details[key] for key in ('metavar', 'choices', 'nargs') if key in details}
    names = [details['short'], name] if 'short' in details else [name]
    group.add_argument(*names, type=hint, required=option.name == 'model', **common)


def run(args: argparse.Namespace) -> int:
    from timm_eca.weights.hub import check_repo_id

    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    keep_freed_memory()
    given = {option.name: getattr(args, option.name) for option in fields(Settings) if hasattr(args, option.name)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    with needing('accelerate', 'sklearn'):
        from timm_eca.finetune.run import finetune
        folder = finetune(Settings.suited(**given))
    is_first = os.environ.get('RANK', '0') == '0'
    return push_and_report(folder, args.push_to_hub) if args.push_to_hub and is_first else 0
