"""Parameters, multiply-adds and activations of a model, counted without computing."""
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_eca.layers.norm_attn import named_norm_attn

__all__ = ['Complexity', 'count_complexity']


class Complexity(NamedTuple):
    """The size of a model, and its work for one image."""
    params: int
    eca_params: int  # parameters of ECA, or of the attention in its place
    multiply_adds: int  # in convolutions and linear layers
    activations: int  # elements of the outputs of these layers, as timm's tables count them


def count_complexity(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Complexity:
    """Counts the parameters and operations of a model on the meta device, which keeps the hooks that count."""
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
