"""Fits a checkpoint to a model with ECA: its keys, and ECA itself where the checkpoint has none."""
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.models import model_entrypoint

from timm_eca.layers.attention import attention_of
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.weights.key_maps import GATE, cut_kernels, kernel_sizes_of, nest_norms, to_timm

__all__ = ['check_complete', 'checkpoint_filter_fn', 'warm_start_state_dict']

_logger = logging.getLogger(__name__)


def warm_start_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Adds constant gates to plain weights, so that the model with ECA computes what the plain one does.

    `timm_eca.add_eca` does the same to a model, and says how.

    Args:
        state_dict: Weights of the model without ECA, by timm's keys.
        model: The model with ECA, or with another attention that can have constant gates.
    """
    places = dict(named_norm_attn(model))
    warm = nest_norms(state_dict, places)
    for name, place in places.items():
        attention = attention_of(place.attn)
        assert attention is not None
        for tensor, value in (*place.norm.named_parameters(), *place.norm.named_buffers()):  # those of frozen norms
            key = f'{name}.norm.{tensor}'
            if (value is place.weight or value is place.bias) and key in warm:
                warm[key] = warm[key] * attention.factor
        for key, value in place.attn.state_dict().items():
            warm[f'{name}.attn.{key}'] = torch.zeros_like(value) if key in attention.zero_init_keys else value
    return warm


def checkpoint_filter_fn(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        base: str,
        drop_head: bool = False,
        strict: bool = True,
) -> dict[str, torch.Tensor]:
    """Fits a checkpoint to a model with ECA, or refuses one that would leave a part of the model as it was.

    A checkpoint with ECA is loaded as it is, one without gives a warm start.

    Args:
        state_dict: Tensors by timm's, torchvision's or the ECA-Net authors' keys.
        model: The model that they are for.
        base: Name of the timm model that has got ECA. Its own filter comes first, as timm calls it: with the model or,
            as RegNet's, without.
        drop_head: The model is a feature extractor that has no place for the head of the checkpoint.
        strict: Refuse a checkpoint that lacks tensors of the model.

    Raises:
        ValueError: The checkpoint has ECA in a part of the blocks, other kernel sizes, or lacks tensors of the model.
    """
    module = sys.modules[model_entrypoint(base).__module__]
    for name, args in (('checkpoint_filter_fn', (model,)), ('_filter_fn', ())):
        if hasattr(module, name):
            state_dict = getattr(module, name)(state_dict, *args)
    state_dict = to_timm(state_dict)
    expected = model.state_dict()
    state_dict = cut_kernels(state_dict, expected)
    if drop_head:
        children = dict(model.named_children())
        state_dict = {key: value for key, value in state_dict.items() if key.partition('.')[0] in children}

    # Before 0.1.0 ECA was named `<block>.eca`.
    strangers = [key for key in state_dict if key not in expected and (key.endswith(GATE) or '.eca.' in key)]
    if strangers:
        raise ValueError(
            f'The checkpoint has the attention {strangers[0]}, which this model does not have: it is not one of this '
            'model with this attention. If timm_eca made it before 0.1.0, convert or fine-tune again.')
    places = dict(named_norm_attn(model))
    if not any(key.startswith(tuple(f'{name}.norm.' for name in places)) for key in state_dict):
        if any(list(place.attn.parameters()) for place in places.values()):
            state_dict = warm_start_state_dict(state_dict, model)
            _logger.info('Plain weights: a warm start, all gates are constant and the norms before them scaled up.')
        else:
            state_dict = nest_norms(state_dict, places)
            _logger.info('Plain weights: this attention has no parameters, hence no warm start.')
    elif any(state_dict[key].shape != expected[key].shape for key in state_dict if key.endswith(GATE)):
        found, wanted = kernel_sizes_of(state_dict), kernel_sizes_of(expected)
        raise ValueError(
            f'The checkpoint has ECA kernels of sizes {found}, by stage, where the model has {wanted}: create the '
            f'model with kernel_sizes={found}.'
        )
    else:
        _logger.info('Weights with ECA: loaded as they are.')

    if strict:
        check_complete(state_dict, model)
    return state_dict


def check_complete(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raises a ValueError if tensors of a model are missing, but for its classifier's.

    timm loads what there is without a word where the number of classes differs.
    """
    cfg: Any = model.pretrained_cfg
    classifiers = cfg.get('classifier') or ()
    optional = tuple(f'{c}.' for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    missing = [key for key in model.state_dict() if key not in state_dict and not key.startswith(optional)]
    if missing:
        raise ValueError(f'The checkpoint lacks {len(missing)} tensors of the model, {missing[0]} the first of them.')
