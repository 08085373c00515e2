"""Whether one operation may take the place of a batch norm and an ECA layer.

It may in eager PyTorch, if nobody watches the modules. torch has no public way to ask for hooks on all modules, modes,
forward-mode AD and functorch, so this file imports private names. If one is gone, `AVAILABLE` is False and the modules
are called one by one.
"""
import logging
from collections.abc import Collection
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from timm_eca.layers.eca import EfficientChannelAttention, is_plain_conv

__all__ = ['AVAILABLE', 'is_batched', 'is_watched', 'may_fuse']

_logger = logging.getLogger(__name__)

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
    from torch.autograd import forward_ad
    from torch.nn.modules.module import (
        _global_backward_hooks,
        _global_backward_pre_hooks,
        _global_forward_hooks,
        _global_forward_pre_hooks,
    )
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    if not hasattr(forward_ad, '_current_level'):
        raise ImportError('torch.autograd.forward_ad._current_level')
    AVAILABLE = True
except ImportError as e:
    AVAILABLE = False
    _logger.warning(f'Norm and ECA are not fused: torch {torch.__version__} lacks {e}.')

_NORMS = (BatchNormAct2d, nn.BatchNorm2d)
# To notice if somebody has replaced the method of a class.
_FORWARDS = {kind: kind.forward for kind in (*_NORMS, EfficientChannelAttention, nn.Conv1d)}


def may_fuse(x: torch.Tensor, norm: Any, eca: Any, dtypes: Collection[torch.dtype]) -> bool:
    """Whether one operation may compute what a norm and an ECA layer do to x, (N, C, H, W), of one of these dtypes."""
    if x.ndim != 4 or x.layout is not torch.strided or x.dtype not in dtypes:
        return False
    if type(norm) not in _NORMS or type(eca) is not EfficientChannelAttention:
        return False
    conv: Any = eca._modules['conv']
    if not is_plain_conv(conv):
        return False
    for module in (norm, eca, conv):
        if _has_hooks(module) or _FORWARDS[type(module)] is not type(module).forward:
            return False
    for module in norm._modules.values():  # dropout and activation of a BatchNormAct2d
        if type(module) is not nn.Identity or _has_hooks(module):
            return False
    parameters, buffers = norm._parameters, norm._buffers
    weight, bias, kernel = parameters.get('weight'), parameters.get('bias'), conv._parameters.get('weight')
    for tensor in (weight, bias, kernel):
        if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
            return False
    if not norm.track_running_stats or norm.momentum is None or buffers.get('num_batches_tracked') is None:
        return False
    # The fused functions skip the checks of batch norm and convolution: leave bad input to the modules.
    n, c, h, w = x.shape
    vectors = (weight, bias, buffers.get('running_mean'), buffers.get('running_var'))
    if any(vector is None or vector.numel() != c for vector in vectors):
        return False
    if any(tensor.device != x.device or not tensor.is_contiguous() for tensor in (*vectors, kernel)):
        return False
    if kernel.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    return n * h * w > (4 if norm.training else 0)  # batch norm needs more than one value in training


def is_watched() -> bool:
    """Whether hooks on all modules, a mode, forward-mode AD or functorch must see each call of a module."""
    if (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
            or _len_torch_dispatch_stack() or forward_ad._current_level >= 0 or _are_functorch_transforms_active()):
        return True
    # The default device is a function mode, too, which changes nothing here.
    return bool(_len_torch_function_stack()) and not all(
        type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` of its own."""
    state = module.__dict__
    return bool(
        state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
        or state['_backward_pre_hooks'] or 'forward' in state)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a gradient is a batch of gradients, of `is_grads_batched`."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)
