"""Whether eager PyTorch computes and nobody watches, so that one operation may take the place of several modules.

torch has no public way to ask for hooks on all modules, modes, forward-mode AD and functorch. What it keeps private is
imported here and nowhere else; where a name is gone, `AVAILABLE` is False and the modules are called one by one.
"""
import logging

import torch
import torch.nn as nn

__all__ = ['AVAILABLE', 'is_batched', 'is_untouched', 'is_watched']

_logger = logging.getLogger(__name__)

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')  # of a module

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

    if not {*_HOOKS, '_parameters', '_buffers', '_modules'} <= nn.Module().__dict__.keys():
        raise ImportError('what nn.Module kept its hooks and tensors in')
    if not hasattr(forward_ad, '_current_level'):
        raise ImportError('torch.autograd.forward_ad._current_level')
    AVAILABLE = True
except ImportError as e:
    AVAILABLE = False
    _logger.warning(f'Norm and ECA are not fused: torch {torch.__version__} lacks {e}.')


def is_watched() -> bool:
    """Whether hooks on all modules, a mode, forward-mode AD or functorch want to see each module's call."""
    if (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
            or _len_torch_dispatch_stack() or forward_ad._current_level >= 0 or _are_functorch_transforms_active()):
        return True
    # The default device is a function mode, too, and does no harm.
    return bool(_len_torch_function_stack()) and not all(
        type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has no hooks and no `forward` of its own."""
    state = module.__dict__
    return not (
        state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
        or state['_backward_pre_hooks'] or 'forward' in state
    )


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a gradient is a batch of gradients, of `is_grads_batched`."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)
