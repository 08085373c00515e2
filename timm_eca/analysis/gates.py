"""The channel weights that ECA computes, by block: the paper's figure of channel weights for any model and images."""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import CecaModule, EcaModule

from timm_eca.layers.eca import EfficientChannelAttention

__all__ = ['gates']

_LAYERS = (EfficientChannelAttention, EcaModule, CecaModule)


def gates(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gates of every ECA layer of a model, which each channel is multiplied by.

    Args:
        model: A model with ECA: a registered one, one that `add_eca` was applied to, or one of timm's own.
        images: A preprocessed batch, (N, C, H, W).

    Returns:
        For the name of each ECA layer, in the order of the network, its gates between 0 and 1, (N, channels), float32.

    Raises:
        ValueError: The model has no ECA.
    """
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        # timm's layers with a second convolution in them are not the paper's.
        if not isinstance(module, _LAYERS) or getattr(module, 'conv2', None) is not None:
            continue

        layer: Any = module
        gate = getattr(layer, 'gate', torch.sigmoid)  # timm's layer may have another

        def keep(conv: nn.Module, args: Any, logits: torch.Tensor, name: str = name, gate: Any = gate) -> None:
            found[name] = gate(logits.detach().squeeze(1).float())
        handles.append(layer.conv.register_forward_hook(keep))
    if not handles:
        raise ValueError(f'{type(model).__name__} has no ECA, hence no gates.')
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return found
