"""Efficient Channel Attention, the layer.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Reference implementation: https://github.com/BangguWu/ECANet (MIT)
"""
import math
import numbers
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['EfficientChannelAttention', 'adaptive_kernel_size', 'check_kernel_size', 'is_plain_conv']


def adaptive_kernel_size(channels: int, gamma: float = 2., beta: float = 1.) -> int:
    """The paper's kernel size for a number of channels (eq. 12): the odd number nearest to (log2(C) + beta) / gamma.

    As in all published implementations, the value is truncated, then an even number is raised by one. For 8 channels or
    more, timm's ``EcaModule`` has the same size. Its smallest size is 3.

    Args:
        channels: Number of channels C, at least 1.
        gamma: Divisor in the paper's map from log2(C) to the kernel size.
        beta: Offset in this map (the paper's b).
    """
    t = int(abs((math.log2(channels) + beta) / gamma))
    return t if t % 2 else t + 1


def check_kernel_size(kernel_size: Any) -> int:
    """Returns the kernel size, or raises a ValueError unless it is an odd, positive integer."""
    integral = isinstance(kernel_size, numbers.Integral) and not isinstance(kernel_size, bool)
    if not integral or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'An ECA kernel size must be an odd, positive integer (1, 3, 5, ...), not {kernel_size!r}.')
    return int(kernel_size)


def is_plain_conv(conv: Any) -> bool:
    """Whether a layer's convolution is as `EfficientChannelAttention` makes it: zero padding, no bias, no dilation."""
    return (
        type(conv) is nn.Conv1d and conv.bias is None and conv.padding_mode == 'zeros' and conv.dilation == (1,)
        and conv.stride == (1,) and conv.padding == (conv.kernel_size[0] // 2,))


class EfficientChannelAttention(nn.Module):
    """Multiplies each channel by a gate computed from its neighbours' global averages (paper, eq. 5 and 9).

    The gate of channel i is sigmoid(sum_j w_j y_(i+j)), where y is the global average of the feature map, j runs over
    the k nearest channels, zeros beyond the first and the last, and the k weights w are shared by all channels.

    It has the weights and the results of timm's ``EcaModule(kernel_size=k)``. But `torch.compile` fuses its convolution
    with the operations around it, and it takes an empty batch.

    Shape:
        - Input: (N, C, H, W), any floating point dtype and memory format.
        - Output: the same.
    """

    def __init__(self, kernel_size: int = 3, device: Any = None, dtype: Any = None) -> None:
        """The kernel size k is odd and positive. Other sizes raise a ValueError."""
        super().__init__()
        k = check_kernel_size(kernel_size)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.channel_gates(x)

    def channel_gates(self, x: torch.Tensor) -> torch.Tensor:
        """The gates, (N, C, 1, 1), of a feature map, (N, C, H, W)."""
        y = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if not torch.jit.is_scripting() and torch.compiler.is_dynamo_compiling() and self._is_plain():
            return self._compiled_gates(y).to(x.dtype)
        return self.conv(y.unsqueeze(1)).sigmoid().squeeze(1).unsqueeze(-1).unsqueeze(-1)

    @torch.jit.unused
    def _is_plain(self) -> bool:
        return is_plain_conv(self.conv) and not (self.conv._forward_hooks or self.conv._forward_pre_hooks)

    @torch.jit.unused
    def _compiled_gates(self, y: torch.Tensor) -> torch.Tensor:
        """The gates, (N, C, 1, 1), as a sum over the kernel: a compiler fuses it, but not a convolution."""
        channels, k = y.shape[1], self.conv.kernel_size[0]
        neighbours = F.pad(y, (k // 2, k // 2))
        logits = sum(neighbours.narrow(1, i, channels) * self.conv.weight[0, 0, i] for i in range(k))
        return torch.as_tensor(logits).sigmoid()[..., None, None]
