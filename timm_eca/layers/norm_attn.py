"""A norm and the attention behind it, in the place of the norm."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from timm_eca.layers.fused import fused_norm_eca

__all__ = ['NormAttn', 'named_norm_attn', 'scaled_norm']


class NormAttn(nn.Module):
    """The last norm of a residual block and the attention behind it: `attn(norm(x))`.

    It stands in the block where the norm stood, so that the block itself is as it was. What converts, freezes or fuses
    norms finds the norm inside. Batch norm and ECA are computed as one operation where that is known to be the same
    (`timm_eca.layers.fused`).

    Shape:
        - Input: (N, C, H, W).
        - Output: the same.
    """

    __jit_unused_properties__ = ['weight', 'bias']  # noqa: RUF012 (TorchScript reads it from the class)

    def __init__(self, norm: nn.Module, attn: nn.Module) -> None:
        """
        Args:
            norm: The norm, of C channels, or a sequence that ends in it.
            attn: The attention, of C channels.
        """
        super().__init__()
        self.norm = norm
        self.attn = attn

    @property
    def weight(self) -> Any:
        """The norm's scale, (C,), which timm's `zero_init_last` looks for, or None."""
        return getattr(scaled_norm(self.norm), 'weight', None)

    @property
    def bias(self) -> Any:
        """The norm's shift, (C,), or None."""
        return getattr(scaled_norm(self.norm), 'bias', None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            out = fused_norm_eca(x, self.norm, self.attn)
            if out is not None:
                return out
        return self.attn(self.norm(x))


def scaled_norm(norm: nn.Module) -> nn.Module:
    """The module that has the scale and the shift: the norm itself, or the last module of a sequence."""
    return norm[-1] if isinstance(norm, nn.Sequential) and len(norm) else norm


def named_norm_attn(model: nn.Module) -> Iterator[tuple[str, NormAttn]]:
    """The places of a model that have attention, with their names, e.g. `layer1.0.bn3`."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NormAttn))
