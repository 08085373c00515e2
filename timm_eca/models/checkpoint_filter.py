"""Fits a checkpoint to a model with ECA: its names, its kernel sizes, and whether all of it is there."""
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.models import model_entrypoint

from timm_eca.errors import ModelError
from timm_eca.layers.norm_attn import load_plain_norm, named_norm_attn
from timm_eca.weights.key_maps import GATE, cut_kernels, describe_kernel_sizes, kernel_sizes_by_stage, to_timm

__all__ = ['check_complete', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)


def checkpoint_filter_fn(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        base: str,
        drop_head: bool = False,
        strict: bool = True,
) -> dict[str, torch.Tensor]:
    """Fits a checkpoint to a model with ECA, or refuses one that would leave a part of the model random.

    A checkpoint with ECA is loaded as it is. One without ECA gives a warm start (`load_plain_norm`).

    Args:
        state_dict: Tensors by timm's, torchvision's or the ECA-Net authors' keys.
        model: The model that loads them.
        base: Name of timm's model without ECA. Its own filter comes first.
        drop_head: Drop the head of the checkpoint, for a feature extractor.
        strict: Refuse a checkpoint that lacks tensors of the model.

    Raises:
        ModelError: The checkpoint has ECA in a part of the blocks, other kernel sizes, or lacks tensors of the model.
    """
    module = sys.modules[model_entrypoint(base).__module__]
    for name, args in (('checkpoint_filter_fn', (model,)), ('_filter_fn', ())):  # the second is RegNet's
        if hasattr(module, name):
            state_dict = getattr(module, name)(state_dict, *args)
    state_dict = to_timm(state_dict)
    expected = model.state_dict()
    state_dict = cut_kernels(state_dict, expected)
    if drop_head:
        children = dict(model.named_children())
        state_dict = {key: value for key, value in state_dict.items() if key.partition('.')[0] in children}

    places = dict(named_norm_attn(model))
    attention = tuple(f'{name}.attn.' for name in places)
    strangers = [
        key for key in state_dict if key not in expected and (key.endswith(GATE) or key.startswith(attention))]
    if strangers:
        raise ModelError(
            f'The checkpoint has the attention {strangers[0]}, which this model does not have',
            'give a checkpoint of this model with this attention')
    if not any(key.startswith((f'{name}.norm.', f'{name}.attn.')) for key in state_dict for name in places):
        for name, place in places.items():
            load_plain_norm(place, state_dict, f'{name}.')
        warm = any(list(place.attn.parameters()) for place in places.values())
        _logger.info('Plain weights: ' + (
            'a warm start, all gates are constant and the norms before them scaled up.' if warm else
            'this attention has no parameters, hence no warm start.'))
    elif any(state_dict[key].shape != expected[key].shape for key in state_dict if key.endswith(GATE)):
        raise ModelError(
            f'The checkpoint has ECA kernels of sizes {describe_kernel_sizes(state_dict)}, by stage, where the model '
            f'has {describe_kernel_sizes(expected)}', *_fix_of_kernel_sizes(state_dict))
    else:
        _logger.info('Weights with ECA: loaded as they are.')

    if strict:
        check_complete(state_dict, model)
    return state_dict


def _fix_of_kernel_sizes(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """How to make a model with the kernel sizes of a checkpoint."""
    stages = kernel_sizes_by_stage(state_dict).values()
    if all(len(sizes) == 1 for sizes in stages):
        return f'create the model with kernel_sizes={[sizes[0] for sizes in stages]}',
    return "create the model with kernel_sizes='adaptive'", 'if that fails, too, use the code that made the checkpoint'


def check_complete(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raises a ModelError if tensors of a model are missing, except its classifier's.

    timm does not report missing tensors if the number of classes differs.
    """
    cfg: Any = model.pretrained_cfg
    classifiers = cfg.get('classifier') or ()
    optional = tuple(f'{c}.' for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    missing = [key for key in model.state_dict() if key not in state_dict and not key.startswith(optional)]
    if missing:
        raise ModelError(
            f'The checkpoint lacks {len(missing)} tensors of the model, {missing[0]} the first of them',
            'give a complete checkpoint of this model')
