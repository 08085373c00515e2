"""`timm-eca list`."""
import argparse
from collections.abc import Iterator
from fnmatch import fnmatchcase
from textwrap import shorten

from timm_eca.commands.console import print_columns
from timm_eca.errors import did_you_mean, printable

__all__ = ['add_arguments', 'run']

MARKS = ('*', '+', '!')  # after a tag: in the weights directory, in the Hub's cache, damaged
TAGS_WIDTH = 38  # keeps the table of the ten models within 100 columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Shows the ten models of ECA-Net and the tags of their weights. With a filter it shows the models that match, '
        'with all tags. These include the models that timm_eca makes of timm\'s other families.')
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
        name = twin_name(pattern) if is_model(pattern) else pattern
        raise UnknownModelError(unknown_model(name), *fixes)
    rows = [('model', 'parameters', 'kernel sizes', 'top-1', 'top-5', 'weights')]
    known: set[str] = set()
    for model in models:
        marked = {name.rstrip(''.join(MARKS)): name for name in _tags(model)}
        known.update(marked)
        found = {name: marked[name] for name in marked if not tag or fnmatchcase(name, tag)}
        if tag and not found:
            continue
        network = create_model(model, device='meta')
        official = OFFICIAL[model] if model in OFFICIAL and TAG in found else None
        tags = ', '.join(sorted(found.values(), key=lambda name: not name.endswith(MARKS)))
        sizes = kernel_sizes_by_stage(network.state_dict()).values()
        rows.append((
            model, f'{sum(p.numel() for p in network.parameters()):,}',
            ','.join('/'.join(map(str, stage)) for stage in sizes),
            *((f'{official.top1:.2f}', f'{official.top5:.2f}') if official else ('', '')),
            tags if args.filter else shorten(tags, TAGS_WIDTH, placeholder=' ...'),
        ))
    if len(rows) == 1:
        raise UnknownModelError(
            f'there are no weights {printable(tag)} of {pattern}{did_you_mean(tag, sorted(known))}',
            f'timm-eca list "{pattern}" shows all weights of these models', *fixes)
    print_columns(rows)
    print('Kernel sizes of each stage; a stage with several sizes has them as 3/5.')
    print(f'Accuracies on ImageNet-1k in percent, reported by the authors for their weights ({TAG}).')
    print('All other weights are warm starts from timm\'s weights.')
    print('* in the weights directory, + in the Hub\'s cache, ! damaged. Others: pretrained=True downloads them,')
    print(f'or, to convert {TAG} beforehand: timm-eca convert --download MODEL')
    if not args.filter:
        print('More: timm-eca list MODEL, and for the models of other families: timm-eca list "eca_*"')
    return 0


def _tags(model: str) -> Iterator[str]:
    """The tags of a model's weights: the registered ones, the default first, then those in the weights directory only.

    Tags of weights on this machine end in one of the `MARKS`.
    """
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_arch_pretrained_cfgs

    from timm_eca.weights.model_folder import WEIGHTS_FILE
    from timm_eca.weights.official import TAG
    from timm_eca.weights.store import WeightsNotFoundError, find_local_weights, hub_id, weights_dir

    registered = {name: cfg.hf_hub_id for name, cfg in get_arch_pretrained_cfgs(model).items() if cfg.has_weights}
    local = [folder.name for folder in sorted(weights_dir().glob(f'{model}.*')) if folder.is_dir()]
    for name, repo_id in {**registered, **{name: None for name in local if name not in registered}}.items():
        tag = name.partition('.')[2]
        try:
            mark = '*' if find_local_weights(name) else ''
        except WeightsNotFoundError:
            mark = '!'
        repo_id = hub_id(name) if tag == TAG else repo_id
        if not mark and isinstance(repo_id and try_to_load_from_cache(repo_id, WEIGHTS_FILE), str):
            mark = '+'
        yield tag + mark
