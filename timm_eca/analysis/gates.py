"""The channel weights that ECA computes in each block, for any model and images."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from timm.layers import CecaModule, EcaModule

from timm_eca.layers.eca import EfficientChannelAttention

__all__ = ['gates', 'has_eca']

_LAYERS = (EfficientChannelAttention, EcaModule, CecaModule)


def _eca_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # Layers of timm with a second convolution differ from the paper.
        if isinstance(module, _LAYERS) and getattr(module, 'conv2', None) is None:
            yield name, module


def has_eca(model: nn.Module) -> bool:
    """Whether a model has ECA, of this package or of timm."""
    return any(True for _ in _eca_layers(model))


def gates(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes the gates of all ECA layers of a model. The layers multiply their channels by them.

    Args:
        model: A model with ECA of this package or of timm.
        images: A preprocessed batch, (N, C, H, W).

    Returns:
        For the name of each ECA layer, in the order of the network, its gates between 0 and 1, (N, channels), float32.

    Raises:
        ValueError: The model has no ECA.
    """
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name, layer in _eca_layers(model):
        gate = getattr(layer, 'gate', torch.sigmoid)  # timm's layer may have another

        def keep(conv: nn.Module, args: Any, logits: torch.Tensor, name: str = name, gate: Any = gate) -> None:
            found[name] = gate(logits.detach().squeeze(1).float())
        handles.append(layer.conv.register_forward_hook(keep))
    if not handles:
        raise ValueError(f'{type(model).__name__} has no ECA and so no gates.')
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
