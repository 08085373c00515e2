"""`timm-eca list`."""
import argparse
from collections.abc import Iterator
from fnmatch import fnmatchcase
from textwrap import shorten

from timm_eca.commands.console import print_columns
from timm_eca.errors import did_you_mean, printable

__all__ = ['add_arguments', 'run']

MARKS = {'*': 'in the weights directory', '+': 'in the Hub\'s cache', '!': 'damaged'}  # after a tag
TAGS_WIDTH = 38  # keeps the table of the ten models within 100 columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Shows the ten models of ECA-Net and the tags of their weights. With a filter, it shows all models that match, '
        'also those of timm\'s other families, with all tags.')
    parser.epilog = 'Examples: timm-eca list regnety_004; timm-eca list "eca_efficientnet*"; timm-eca list "eca_*.a1_*"'
    parser.add_argument(
        'filter', nargs='?', default='', help='name or pattern of models or of weights, with or without eca_')


def run(args: argparse.Namespace) -> int:
    from timm.models import create_model, is_model, list_models

    from timm_eca.models.insert import twin_name
    from timm_eca.weights.key_maps import kernel_sizes_by_stage
    from timm_eca.weights.names import UnknownModelError, unknown_model
    from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES, TAG

    fixes = ('timm-eca list shows the models of ECA-Net', 'timm-eca list "eca_*" shows all models')
    modules = [*OFFICIAL_MODULES, *(['eca_twins'] if args.filter else [])]
    pattern, _, tag = args.filter.partition('.')
    models = list_models(pattern, module=modules) or list_models(twin_name(pattern), module=modules)
    if not models:
        raise UnknownModelError(unknown_model(twin_name(pattern) if is_model(pattern) else pattern), *fixes)
    all_marks = {model: dict(_marks(model)) for model in models}
    found = {
        model: [name for name in marks if not tag or fnmatchcase(name, tag)] for model, marks in all_marks.items()}
    if not any(found.values()) and tag:
        known = sorted({name for marks in all_marks.values() for name in marks})
        raise UnknownModelError(
            f'there are no weights {printable(tag)} of {pattern}{did_you_mean(tag, known)}',
            f'timm-eca list "{pattern}" shows all weights of these models', *fixes)

    official = {model for model, tags in found.items() if model in OFFICIAL and TAG in tags}
    rows = [('model', 'parameters', 'kernel sizes', *(('top-1', 'top-5') if official else ()), 'weights')]
    for model, tags in found.items():
        if tag and not tags:
            continue
        network = create_model(model, device='meta')
        sizes = kernel_sizes_by_stage(network.state_dict()).values()
        accuracies = (f'{OFFICIAL[model].top1:.2f}', f'{OFFICIAL[model].top5:.2f}') if model in official else ('', '')
        marks = all_marks[model]
        text = ', '.join(name + marks[name] for name in sorted(tags, key=lambda name: not marks[name]))
        rows.append((
            model, f'{sum(p.numel() for p in network.parameters()):,}',
            ','.join('/'.join(map(str, stage)) for stage in sizes), *(accuracies if official else ()),
            text if args.filter else shorten(text, TAGS_WIDTH, placeholder=' ...'),
        ))
    print_columns(rows)
    if any('/' in row[2] for row in rows):
        print('3/5: a stage with both kernel sizes.')
    if official:
        print(f'{TAG}: the weights of the authors, with the accuracies on ImageNet-1k (%) that they report.')
        print('To download and convert them before their first use: timm-eca convert --download MODEL')
    if any({*tags} - {TAG} for tags in found.values()):
        print('Tags of timm: warm starts from timm\'s weights of the plain network.')
    if used := [f'{mark} {meaning}' for mark, meaning in MARKS.items() if any(mark in row[-1] for row in rows)]:
        print(', '.join(used))
    print('Weights without a mark: pretrained=True downloads them.')
    if not args.filter:
        print('More: timm-eca list MODEL, and for the models of other families: timm-eca list "eca_*"')
    return 0


def _marks(model: str) -> Iterator[tuple[str, str]]:
    """Yields the tags of a model's weights with their marks: first registered ones, then others on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_arch_pretrained_cfgs

    from timm_eca.weights.model_folder import WEIGHTS_FILE
    from timm_eca.weights.official import TAG
    from timm_eca.weights.store import WeightsNotFoundError, find_local_weights, hub_id, weights_dir

    registered = {name: cfg.hf_hub_id for name, cfg in get_arch_pretrained_cfgs(model).items() if cfg.has_weights}
    local = [folder.name for folder in sorted(weights_dir().glob(f'{model}.*')) if folder.is_dir()]
    for name in dict.fromkeys([*registered, *local]):
        tag = name.partition('.')[2]
        try:
            mark = '*' if find_local_weights(name) else ''
        except WeightsNotFoundError:
            mark = '!'
        repo_id = hub_id(name) if tag == TAG else registered.get(name)
        if not mark and repo_id and isinstance(try_to_load_from_cache(repo_id, WEIGHTS_FILE), str):
            mark = '+'
        yield tag, mark
