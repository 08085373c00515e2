"""`timm-eca list`."""
import argparse
import sys

from huggingface_hub import try_to_load_from_cache
from timm.models import create_model, get_arch_pretrained_cfgs, list_models

from timm_eca.commands.columns import print_columns
from timm_eca.errors import first_line
from timm_eca.weights.key_maps import kernel_sizes_of
from timm_eca.weights.model_folder import WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES, TAG
from timm_eca.weights.store import WeightsNotFoundError, find_local_weights, hub_id, weights_dir

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'filter', nargs='?', default='', help='only these, among the twins of timm\'s models too, e.g. "eca_regnet*"')


def run(args: argparse.Namespace) -> int:
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
    print_columns(rows)
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
