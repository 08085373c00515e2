"""The channel attentions that the paper compares ECA with, for the same places (`attn_layer=`).

Each multiplies the C channels of a feature map by gates between 0 and 1, computed from y, the averages of the channels.
timm's layers are used where timm has them.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_attn

from timm_eca.errors import ModelError
from timm_eca.layers.eca import EfficientChannelAttention, check_kernel_size

__all__ = [
    'ATTENTIONS', 'Attention', 'ChannelGate', 'EcaNs', 'SeGc', 'SeVar1', 'SeVar2', 'SeVar3', 'attention_of',
    'get_attention',
]


class ChannelGate(nn.Module):
    """Multiplies each channel by a gate computed from the averages of all channels, (N, C, H, W) -> the same."""

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        """The gates before the sigmoid, (N, C), from the averages, (N, C)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x * self.gate(y).sigmoid().unsqueeze(-1).unsqueeze(-1)


class SeVar1(ChannelGate):
    """SE-Var1: the averages themselves, sigmoid(y). No parameters."""

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        return y


class SeVar2(ChannelGate):
    """SE-Var2: a weight for each channel, sigmoid(w * y). C parameters."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        return self.weight * y


class SeVar3(ChannelGate):
    """SE-Var3: each gate depends on all channels, sigmoid(W y). C^2 parameters."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels, bias=False, device=device, dtype=dtype)

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc(y)


class SeGc(ChannelGate):
    """SE-GC: each gate depends on the channels of its group, of 16 groups. C^2 / 16 parameters."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1, groups=16, bias=False, device=device, dtype=dtype)

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        return self.conv(y.unsqueeze(-1)).squeeze(-1)


class EcaNs(ChannelGate):
    """ECA-NS: each gate depends on the k nearest channels, with weights of its own. k C parameters."""

    def __init__(self, channels: int, kernel_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        k = check_kernel_size(kernel_size)
        # It computes one product for each channel. The name and the shape of the weights are the authors'.
        self.conv = nn.Conv1d(channels, channels, k, groups=channels, bias=False, device=device, dtype=dtype)

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        k = self.conv.kernel_size[0]
        return self.conv(F.pad(y, (k // 2, k // 2)).unfold(1, k, 1)).squeeze(-1)  # of (N, C, k)


class Attention(NamedTuple):
    """How to make an attention, and how to make its gates constant."""
    layer: type[nn.Module]
    make: Callable[..., nn.Module]  # (channels, kernel_size, device=, dtype=) -> layer
    zero_init_keys: tuple[str, ...]  # if these tensors are zero, every gate is sigmoid(0) = 0.5 for any input
    factor: float = 2.  # multiplies the norm before constant gates to undo them: 2 for each gate
    divisor: int = 1  # the number of channels must be a multiple of this


CbamModule, CecaModule, CoordAttn, SEModule = map(get_attn, ('cbam', 'ceca', 'coord', 'se'))

ATTENTIONS: dict[str, Attention] = {
    'eca': Attention(
        EfficientChannelAttention, lambda c, k, **dd: EfficientChannelAttention(k, **dd), ('conv.weight',)),
    'eca_ns': Attention(EcaNs, lambda c, k, **dd: EcaNs(c, k, **dd), ('conv.weight',)),
    'se_var1': Attention(SeVar1, lambda c, k, **dd: SeVar1(), ()),
    'se_var2': Attention(SeVar2, lambda c, k, **dd: SeVar2(c, **dd), ('weight',)),
    'se_var3': Attention(SeVar3, lambda c, k, **dd: SeVar3(c, **dd), ('fc.weight',)),
    'se_gc': Attention(SeGc, lambda c, k, **dd: SeGc(c, **dd), ('conv.weight',), divisor=16),
    'se': Attention(SEModule, lambda c, k, **dd: SEModule(c, **dd), ('fc2.weight', 'fc2.bias')),
    # A zero norm learns its scale from the first step. A zero convolution before a norm would get no useful gradient.
    'cbam': Attention(
        CbamModule, lambda c, k, **dd: CbamModule(c, **dd),
        ('channel.fc2.weight', 'spatial.conv.bn.weight', 'spatial.conv.bn.bias'), factor=4.),
    'coord': Attention(CoordAttn, lambda c, k, **dd: CoordAttn(c, **dd), ('conv_h.weight', 'conv_w.weight'), factor=4.),
    'ceca': Attention(CecaModule, lambda c, k, **dd: CecaModule(kernel_size=k, **dd), ('conv.weight',)),
}


def get_attention(attn_layer: str) -> Attention:
    """The attention with this name, or a ModelError if there is none."""
    if attn_layer not in ATTENTIONS:
        raise ModelError(f'Unknown attention {attn_layer!r}', f'use one of {", ".join(ATTENTIONS)}')
    return ATTENTIONS[attn_layer]


def attention_of(layer: nn.Module) -> Attention | None:
    """The entry of `ATTENTIONS` for a layer, or None."""
    return next((attention for attention in ATTENTIONS.values() if type(layer) is attention.layer), None)
