"""Parameters, multiply-adds and activations of a model, counted without computing."""
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_eca.layers.norm_attn import named_norm_attn

__all__ = ['Complexity', 'count_complexity']


class Complexity(NamedTuple):
    """What a model has and does."""
    params: int
    eca_params: int  # of ECA, or of the attention in its place
    multiply_adds: int  # of the convolutions and linear layers, for one image
    activations: int  # elements of the outputs of the same, for one image, as timm's tables count them


def count_complexity(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Complexity:
    """Counts a model's parameters, multiply-adds and activations.

    Args:
        model: A model on the meta device, so that nothing is computed. It keeps the hooks that count.
        input_size: Channels, height and width of the image.
    """
    activations: list[int] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: activations.append(output.numel()))
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device='meta'))
    return Complexity(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for _, place in named_norm_attn(model) for p in place.attn.parameters()),
        flops.get_total_flops() // 2,
        sum(activations),
    )
