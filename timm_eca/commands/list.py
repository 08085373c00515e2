"""`timm-eca list`."""
import argparse
from collections.abc import Iterator
from fnmatch import fnmatchcase
from textwrap import shorten
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from timm.models import create_model, get_arch_pretrained_cfgs, is_model, list_models

from timm_eca.commands.console import print_columns
from timm_eca.errors import TimmEcaError, first_line
from timm_eca.models.insert import twin_name
from timm_eca.models.names import unknown_model
from timm_eca.weights.key_maps import kernel_sizes_of
from timm_eca.weights.model_folder import WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES, TAG
from timm_eca.weights.store import WeightsNotFoundError, find_local_weights, hub_id, weights_dir

__all__ = ['add_arguments', 'run']

HEADER = ('model', 'parameters', 'kernel sizes', 'top-1', 'top-5', 'weights')
TAGS_WIDTH = 38  # keeps the table of the ten models within 100 columns


class _Weights(NamedTuple):
    tag: str
    where: str  # they are on this machine, or how to get them
    is_here: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Shows the ten models of ECA-Net and its warm starts. With a filter it shows each of the weights of the models '
        'that fit, also of the models that timm_eca makes of timm\'s other models.')
    parser.epilog = 'Examples: timm-eca list regnety_004; timm-eca list "eca_efficientnet*"'
    parser.add_argument(
        'filter', nargs='?', default='', help='name or pattern of models, with or without eca_ and a tag')


def run(args: argparse.Namespace) -> int:
    if args.filter:
        print_columns([HEADER, *_rows_of_weights(args.filter)])
        print('Accuracies on ImageNet-1k in percent, reported by the authors.')
    else:
        print_columns([HEADER, *_rows_of_models()])
        print(f'Accuracies on ImageNet-1k in percent, reported by the authors for their weights ({TAG}).')
        print('All other weights are warm starts from timm\'s. * marks what is on this machine.')
        print('More: timm-eca list MODEL, and for the models of other families: timm-eca list "eca_*"')
    return 0


def _rows_of_models() -> Iterator[tuple[str, ...]]:
    for model in list_models(module=OFFICIAL_MODULES):
        weights = sorted(_weights_of(model), key=lambda w: not w.is_here)
        tags = ', '.join(f'{w.tag}*' if w.is_here else w.tag for w in weights)
        yield model, *_describe(model), *_reported(model), shorten(tags, TAGS_WIDTH, placeholder=' ...')


def _rows_of_weights(filter: str) -> list[tuple[str, ...]]:
    """A row for each of the weights of the models that fit a filter.

    Raises:
        TimmEcaError: Nothing fits.
    """
    pattern, _, tag_pattern = filter.partition('.')
    modules = [*OFFICIAL_MODULES, 'eca_twins']
    models = list_models(pattern, module=modules) or list_models(twin_name(pattern), module=modules)
    rows: list[tuple[str, ...]] = []
    for model in models:
        registered = get_arch_pretrained_cfgs(model)
        described = _describe(model)
        for weights in _weights_of(model):
            if not fnmatchcase(weights.tag, tag_pattern or '*'):
                continue
            name = f'{model}.{weights.tag}' if weights.tag else model
            if name in registered:
                rows.append((name, *described, *_reported(model if weights.tag == TAG else ''), weights.where))
                continue
            try:
                rows.append((name, *_describe(name), *_reported(''), weights.where))
            except Exception as e:  # any content of one folder, so that the others are shown
                rows.append((name, '', '', *_reported(''), f'damaged: {first_line(e, 200)}'))
    if rows:
        return rows
    if models:
        raise TimmEcaError(unknown_model(f'{models[0]}.{tag_pattern}'), f'timm-eca list {models[0]} shows its weights')
    name = twin_name(pattern) if is_model(pattern) else pattern
    raise TimmEcaError(unknown_model(name), 'timm-eca list "eca_*" shows all models')


def _reported(model: str) -> tuple[str, str]:
    """The accuracies that the authors report for a model, or empty cells."""
    return (f'{OFFICIAL[model].top1:.2f}', f'{OFFICIAL[model].top5:.2f}') if model in OFFICIAL else ('', '')


def _describe(name: str) -> tuple[str, str]:
    """The number of parameters and the kernel sizes of a model, in words."""
    network = create_model(name, device='meta')
    params = sum(p.numel() for p in network.parameters())
    return f'{params:,}', ','.join(map(str, kernel_sizes_of(network.state_dict())))


def _weights_of(model: str) -> Iterator[_Weights]:
    """The registered weights of a model, the default ones first, then what else the weights directory has."""
    registered = get_arch_pretrained_cfgs(model)
    for name, cfg in registered.items():
        yield _find(name, cfg.hf_hub_id)
    for folder in sorted(weights_dir().glob(f'{model}.*')):
        if folder.is_dir() and folder.name not in registered:
            yield _find(folder.name, None)


def _find(name: str, repo_id: str | None) -> _Weights:
    model, _, tag = name.partition('.')
    try:
        if find_local_weights(name):
            return _Weights(tag, 'converted', True)
    except WeightsNotFoundError as e:
        return _Weights(tag, f'damaged: {first_line(e)}', False)
    repo_id = hub_id(name) if tag == TAG else repo_id
    if repo_id and isinstance(try_to_load_from_cache(repo_id, WEIGHTS_FILE), str):
        return _Weights(tag, f'in the Hub\'s cache, {repo_id}', True)
    if tag == TAG:
        return _Weights(tag, f'timm-eca convert --download {model}', False)
    return _Weights(tag, f'warm start from {repo_id}' if repo_id else 'none', False)
