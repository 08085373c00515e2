"""Fits a checkpoint to a model with ECA: its keys, and ECA itself where the checkpoint has none."""
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from timm_eca.layers.attention import attention_of
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.weights.key_maps import GATE, kernel_sizes_of, nest_norms, to_timm

__all__ = ['checkpoint_filter_fn', 'warm_start_state_dict']

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
        for tensor, parameter in place.norm.named_parameters():
            key = f'{name}.norm.{tensor}'
            if (parameter is place.weight or parameter is place.bias) and key in warm:
                warm[key] = warm[key] * attention.factor
        for key, value in place.attn.state_dict().items():
            warm[f'{name}.attn.{key}'] = torch.zeros_like(value) if key in attention.zero_init_keys else value
    return warm


def checkpoint_filter_fn(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        drop_head: bool = False,
) -> dict[str, torch.Tensor]:
    """Fits a checkpoint to a model with ECA, or refuses one that would leave a part of the model as it was.

    A checkpoint with ECA is loaded as it is, one without gives a warm start. timm loads without checking for missing
    tensors when the number of classes differs, so it's done here.

    Args:
        state_dict: Tensors by timm's, torchvision's or the ECA-Net authors' keys.
        model: The model that they are for.
        drop_head: The model is a feature extractor that has no place for the head of the checkpoint.

    Raises:
        ValueError: The checkpoint has ECA in a part of the blocks, other kernel sizes, or lacks tensors of the model.
    """
    state_dict = to_timm(state_dict)
    expected = model.state_dict()
    if drop_head:
        children = dict(model.named_children())
        state_dict = {key: value for key, value in state_dict.items() if key.partition('.')[0] in children}

    if any('.eca.' in key for key in state_dict):
        raise ValueError(
            'The checkpoint has tensors named `<block>.eca`, as timm_eca did before 0.1.0: convert the authors\' file '
            'again, or fine-tune again.')
    stranger = next((key for key in state_dict if key.endswith(GATE) and key not in expected), None)
    if stranger is not None:
        raise ValueError(
            f'The checkpoint has attention in {stranger.removesuffix(GATE)}, where this model has none, or another: it '
            'is not one of this model with this attention.')
    places = dict(named_norm_attn(model))
    gates = [f'{name}.attn.{key}' for name, place in places.items() for key in place.attn.state_dict()]
    missing = [key for key in gates if key not in state_dict]
    if gates and not any(key.startswith(tuple(f'{name}.attn.' for name in places)) for key in state_dict):
        state_dict = warm_start_state_dict(state_dict, model)
        _logger.info('Plain weights: a warm start, all gates are constant and the norms before them scaled up.')
    elif not gates:
        state_dict = nest_norms(state_dict, places)
        _logger.info('Weights loaded as they are: this attention has no parameters, hence no warm start.')
    elif missing:
        raise ValueError(
            f'The checkpoint has {len(gates) - len(missing)} of the {len(gates)} tensors of the model\'s attention '
            f'layers, {missing[0]} is not there: it is not one of this model with this attention.'
        )
    elif any(state_dict[key].shape != expected[key].shape for key in gates if key.endswith(GATE)):
        found, wanted = kernel_sizes_of(state_dict), kernel_sizes_of(expected)
        raise ValueError(
            f'The checkpoint has ECA kernels of sizes {found}, by stage, where the model has {wanted}: create the '
            f'model with kernel_sizes={found}.'
        )
    else:
        _logger.info('Weights with ECA: loaded as they are.')

    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    classifiers = cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    optional = {f'{classifier}.{tensor}' for classifier in classifiers for tensor in ('weight', 'bias')}
    missing = [key for key in expected if key not in state_dict and key not in optional]
    if missing:
        raise ValueError(f'The checkpoint lacks {len(missing)} tensors of the model, {missing[0]} the first of them.')
    return state_dict
