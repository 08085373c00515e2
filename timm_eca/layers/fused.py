"""The tail of a residual block with ECA - norm, ECA, shortcut, activation - as one operation.

Written module by module, ECA keeps the norm's output for backward, beside what the norm itself keeps, and passes over
the feature map three times more than the plain block. Neither is needed. With z the last convolution's output, batch
normalization is x = weight * n + bias, where n = (z - mean) * invstd; the block's output is

    out = act(p * gate * x + shortcut),    gate = sigmoid(conv(y)),    y = average of x over the map,

with one gate for each image and channel and p the factor of drop path for each image (paper, eq. 5 and 9).

Forward. `batch_norm` itself computes x, so that with constant gates of 0.5 and a doubled norm the block's output is bit
for bit the plain block's; from there on x is overwritten. Nothing is kept but z and, for its sign, the output, which
the plain block keeps, too, and vectors with one value for each image and channel.

Backward. With d the gradient where the activation let through, which is the shortcut's gradient, too, all sums over
the map that the gates and the norm need follow from two, sum(d) and sum(d * n), and from the averages of n:

    dgate = p * (weight * sum(d * n) + bias * sum(d)),    dy = conv'(dgate * gate * (1 - gate)),
    dx    = p * gate * d + dy / (H * W),
    dbias = sum(dx)     = sum over images of  p * gate * sum(d)     + dy,
    dweight = sum(dx * n) = sum over images of  p * gate * sum(d * n) + dy * average of n,
    dz    = weight * invstd * (dx - (dbias + n * dweight) / M),    M = N * H * W,

the last without its fraction where the norm's statistics are frozen. dz is thus linear in d and z, with coefficients
for each image and channel: one pass to reduce, one to write.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""
import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from timm_eca.layers.eca import EfficientChannelAttention, is_plain_conv

__all__ = ['fused_tail', 'reference_tail', 'set_fused']

_fused = os.environ.get('TIMM_ECA_FUSED', '1') != '0'


def set_fused(enable: bool = True) -> None:
    """Switches the fused tail on or off; it is on unless the environment variable `TIMM_ECA_FUSED` is 0.

    Blocks compute the same without it, module by module, in more time and memory.
    """
    global _fused
    _fused = enable


def reference_tail(
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kernel: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        eps: float,
        scale: torch.Tensor | None = None,
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
) -> torch.Tensor:
    """What the fused tail computes, in plain differentiable operations.

    Args:
        z: Output of the block's last convolution, (N, C, H, W).
        weight: Scale of the norm, (C,).
        bias: Shift of the norm, (C,).
        kernel: ECA's kernel, (1, 1, k).
        mean: Frozen mean of the norm, (C,); None for the batch's.
        var: Frozen variance of the norm, (C,); None for the batch's.
        eps: The norm's constant below the root.
        scale: Factors of drop path, (N, 1, 1, 1).
        shortcut: What is added, (N, C, H, W).
        relu: Whether the block ends in a ReLU.

    Returns:
        The block's output, (N, C, H, W).
    """
    x = F.batch_norm(z, mean, var, weight, bias, training=mean is None, eps=eps)
    y = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1).to(kernel.dtype)
    gate = F.conv1d(y, kernel, padding=kernel.shape[-1] // 2).sigmoid()
    x = x * gate.squeeze(1).unsqueeze(-1).unsqueeze(-1).to(x.dtype)
    if scale is not None:
        x = x * scale
    if shortcut is not None:
        x = x + shortcut
    return x.relu() if relu else x


def fused_tail(
        x: torch.Tensor,
        conv: nn.Module,
        norm: nn.Module | None,
        eca: nn.Module,
        shortcut: torch.Tensor | None = None,
        drop_path: nn.Module | None = None,
        act: nn.Module | None = None,
        after_norm: nn.Module | None = None,
) -> torch.Tensor | None:
    """The end of a block from its last convolution on, in the least time and memory, or None where that is not known.

    It applies in eager PyTorch on a CPU or a CUDA device, to batch norm and ECA, whatever is trained or frozen. It
    does not when a module that it would pass over has hooks or another `forward`, nor to other norms and attentions,
    in TorchScript, FX, `torch.compile` and `torch.export`, below `torch.func` or a mode of torch's. The block's modules
    called one by one are right everywhere. What it depends on must not change between a checkpointed forward pass and
    its recomputation, since the two ways keep different tensors for backward.

    Args:
        x: Input of the block's last convolution.
        conv: The block's last convolution, or timm's `ConvNormAct`.
        norm: The norm behind it. None where a `ConvNormAct` holds both.
        eca: The attention.
        shortcut: What is added, of the shape of the output.
        drop_path: Drop path, where a shortcut is added.
        act: Activation at the end. ReLU is part of the operation, others follow it.
        after_norm: What stands between norm and attention; it must be an `nn.Identity`.

    Returns:
        The block's output, (N, C, H, W), or None: nothing was computed.
    """
    if not _fused or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if norm is None:
        if not _is_untouched(conv) or type(conv) is not ConvNormAct or conv.aa is not None:
            return None
        conv, norm = conv.conv, conv.bn
    if after_norm is not None and not _does_nothing(after_norm):
        return None
    if not _applies(x, conv, norm, eca, shortcut, drop_path):
        return None
    bn: Any = norm
    layer: Any = eca
    parameters, buffers = bn._parameters, bn._buffers
    weight, bias, mean, var = parameters['weight'], parameters['bias'], buffers['running_mean'], buffers['running_var']
    kernel = layer._modules['conv']._parameters['weight']
    relu = type(act) is nn.ReLU and _is_untouched(act)

    z = conv(x)
    scale = None
    if shortcut is not None and isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob:
        scale = drop_path(z.new_ones((z.shape[0], 1, 1, 1)))  # draws what it would draw for z itself
    if bn.training:
        bn.num_batches_tracked.add_(1)
    if torch.is_grad_enabled() and (
            z.requires_grad or weight.requires_grad or bias.requires_grad or kernel.requires_grad
            or (shortcut is not None and shortcut.requires_grad)):
        out = _FusedTail.apply(
            z, weight, bias, kernel, shortcut, scale, mean, var, bn.training, bn.momentum, bn.eps, relu)
    else:
        if not bn.training and z.is_cpu and type(conv) is nn.Conv2d and _is_untouched(conv):
            # Nothing else has seen what an untouched convolution returned: it may be overwritten.
            nothing = weight.new_empty(0)  # statistics that batch norm returns in training
            torch.native_batch_norm(z, weight, bias, mean, var, False, 0., bn.eps, out=(z, nothing, nothing))
        else:
            z = _batch_norm(z, weight, bias, mean, var, bn.training, bn.momentum, bn.eps)
        out = _finish(z, _convolve(z.mean((2, 3), keepdim=True), kernel)[0].sigmoid_(), scale, shortcut, relu)
    return out if act is None or relu else act(out)


_NORMS = (BatchNormAct2d, nn.BatchNorm2d)
_DROP_PATHS = (DropPath, nn.Identity)
# What the classes do, to notice where somebody has replaced it.
_FORWARDS = {
    kind: kind.forward
    for kind in (*_NORMS, *_DROP_PATHS, EfficientChannelAttention, nn.Conv1d, nn.Conv2d, nn.ReLU, ConvNormAct)
}


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling a module does what is known of its class: no hooks, no other `forward`."""
    state = module.__dict__
    return not (
        state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
        or state['_backward_pre_hooks'] or 'forward' in state
    ) and _FORWARDS.get(type(module)) is type(module).forward


def _does_nothing(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and _is_untouched(module)


def _applies(
        x: torch.Tensor,
        conv: nn.Module,
        norm: nn.Module,
        eca: nn.Module,
        shortcut: torch.Tensor | None,
        drop_path: nn.Module | None,
) -> bool:
    # Asked for each block of each batch, hence in few steps.
    if type(x) is not torch.Tensor or not isinstance(conv, nn.Conv2d):
        return False
    if type(norm) not in _NORMS or type(eca) is not EfficientChannelAttention:
        return False
    # Private: torch has no public way to ask for hooks on all modules, modes, forward-mode AD and functorch.
    if (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
            or torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()):
        return False
    if torch._C._len_torch_function_stack() and not all(
            type(mode) is DeviceContext for mode in _get_current_function_mode_stack()):
        return False  # the default device is such a mode, and does no harm
    if not (x.is_cpu or x.is_cuda) or x.ndim != 4 or x.numel() == 0 or x.layout is not torch.strided:
        return False
    gate_conv: Any = eca._modules['conv']
    if not is_plain_conv(gate_conv):
        return False
    if not (_is_untouched(norm) and _is_untouched(eca) and _is_untouched(gate_conv)):
        return False
    for module in norm._modules.values():  # dropout and activation of a BatchNormAct2d
        if not _does_nothing(module):
            return False
    if shortcut is not None:
        if drop_path is not None and (type(drop_path) not in _DROP_PATHS or not _is_untouched(drop_path)):
            return False
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if type(shortcut) is not torch.Tensor or shortcut.dtype != dtype:
            return False
    parameters, buffers = norm._parameters, norm._buffers
    for tensor in (parameters.get('weight'), parameters.get('bias'), gate_conv._parameters.get('weight')):
        if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
            return False
    if not norm.track_running_stats or norm.momentum is None:
        return False
    if buffers.get('running_mean') is None or buffers.get('num_batches_tracked') is None:
        return False
    # Perhaps one value for each channel, which batch norm refuses.
    return not (norm.training and x.shape[0] == 1 and x.shape[2] * x.shape[3] <= 4)


def _batch_norm(
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        training: bool,
        momentum: float,
        eps: float,
) -> torch.Tensor:
    return torch.batch_norm(
        z, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled)


def _convolve(y: torch.Tensor, kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ECA's convolution of averages, (N, C, 1, 1), and, to differentiate it, the row of values that it looked at."""
    n, c, radius = y.shape[0], y.shape[1], kernel.shape[-1] // 2
    y = y.to(kernel.dtype)
    if radius == 0:
        return y * kernel, y
    # All images in a row, zeros between: one long convolution is several times faster on a CPU than many short ones.
    row = y.view(n, c)
    if n > 1:
        row = F.pad(row, (0, radius))
    row = row.view(1, 1, -1)
    return torch.conv1d(row, kernel, None, 1, radius).view(n, -1)[:, :c].unsqueeze(-1).unsqueeze(-1), row


def _convolve_backward(
        grad: torch.Tensor,
        row: torch.Tensor,
        kernel: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the averages, (N, C, 1, 1), and of the kernel."""
    n, c, radius = grad.shape[0], grad.shape[1], kernel.shape[-1] // 2
    grad = grad.to(kernel.dtype)
    if radius == 0:
        return grad * kernel, (grad * row).sum().view_as(kernel)
    grad = grad.reshape(n, c)
    if n > 1:
        grad = F.pad(grad, (0, radius))
    dy, dkernel, _ = torch.ops.aten.convolution_backward(
        grad.view(1, 1, -1), row, kernel, None, (1,), (radius,), (1,), False, (0,), 1, (True, True, False))
    return dy.view(n, -1)[:, :c].unsqueeze(-1).unsqueeze(-1), dkernel


def _finish(
        x: torch.Tensor,
        gate: torch.Tensor,
        scale: torch.Tensor | None,
        shortcut: torch.Tensor | None,
        relu: bool,
) -> torch.Tensor:
    """Gates, drop path, shortcut and ReLU, in the place of x."""
    gate = gate.to(x.dtype)
    if scale is not None:
        gate = gate * scale
    if shortcut is None:
        x.mul_(gate)
    else:
        torch.addcmul(shortcut, x, gate, out=x)
    return x.relu_() if relu else x


def _sums(d: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over the map of d * z and of d, each (N, C, 1, 1); both tensors have one memory format."""
    n, c, h, w = z.shape
    if z.is_contiguous():  # as one image of N * C channels
        sum_dz, sum_d = _channel_sums(d.view(1, n * c, h, w), z.view(1, n * c, h, w))
    elif z.is_cpu and c * h * w >= 2 ** 18:  # image by image, each in the processor's cache
        sums = [_channel_sums(*images) for images in zip(d.split(1), z.split(1))]
        sum_dz, sum_d = (torch.cat(s) for s in zip(*sums))
    else:
        sum_dz, sum_d = (z * d).sum((2, 3)), d.sum((2, 3))
    return sum_dz.view(n, c, 1, 1), sum_d.view(n, c, 1, 1)


def _channel_sums(d: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sums of one image, (C,): both in one pass, by the reduction of batch norm's own backward."""
    zeros, ones = z.new_zeros(z.shape[1]), z.new_ones(z.shape[1])
    _, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
        d, z, ones, zeros, ones, zeros, ones, True, 0., (False, True, True))
    return sum_dz, sum_d


class _FusedTail(torch.autograd.Function):
    # Values of each image and channel are (N, C, 1, 1) below, of each channel (C, 1, 1).

    @staticmethod
    def forward(
            ctx: Any,
            z: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            kernel: torch.Tensor,
            shortcut: torch.Tensor | None,
            scale: torch.Tensor | None,
            running_mean: torch.Tensor,
            running_var: torch.Tensor,
            training: bool,
            momentum: float,
            eps: float,
            relu: bool,
    ) -> torch.Tensor:
        dtype = torch.promote_types(z.dtype, torch.float32)
        if training:
            x, mean, invstd = torch.native_batch_norm(
                z, weight, bias, running_mean, running_var, True, momentum, eps)
        else:
            x = _batch_norm(z, weight, bias, running_mean, running_var, False, momentum, eps)
            mean, invstd = running_mean, (running_var.to(dtype) + eps).rsqrt()
        # Of n, not of x: they could not be told from those of x where a scale is zero.
        averages = (z.mean((2, 3), keepdim=True, dtype=dtype) - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
        y = torch.addcmul(bias.view(-1, 1, 1).to(dtype), averages, weight.view(-1, 1, 1).to(dtype))
        logits, row = _convolve(y, kernel)
        gate = logits.sigmoid().to(dtype)
        out = _finish(x, gate, scale, shortcut, relu)
        # Of the bias the value alone, as batch norm needs none of it: an optimizer may change it before backward.
        ctx.save_for_backward(
            z, weight, bias.clone(), kernel, mean, invstd, averages, row, gate, scale, out if relu else None,
            None if training else running_var)
        ctx.training, ctx.eps, ctx.bias = training, eps, bias
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, weight, bias, kernel, mean, invstd, averages, row, gate, scale, out, _ = ctx.saved_tensors
        # Private: torch has no public way to ask whether it is a batch of gradients, of `is_grads_batched`.
        if torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(grad) or (
                torch._C._functorch.is_legacy_batchedtensor(grad)):
            # `create_graph`, where the gradients are to be differentiable themselves, or a batch of gradients.
            return _differentiable_backward(ctx, grad)

        # threshold_backward and sigmoid_backward are what autograd itself calls for ReLU and sigmoid.
        d = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        dshortcut = d if ctx.needs_input_grad[4] else None
        dtype = gate.dtype
        n, c, h, w = z.shape
        planes = z.is_contiguous()
        # In float16 and bfloat16 what cancels below would be rounded, or overflow, before it does.
        z_dtype, z = z.dtype, z.to(dtype)
        d = d.to(dtype).contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)
        sum_dz, sum_d = _sums(d, z)

        weight, bias, mean, invstd = (t.view(-1, 1, 1).to(dtype) for t in (weight, bias, mean, invstd))
        sum_dn = torch.addcmul(sum_dz, sum_d, mean, value=-1).mul_(invstd)
        dgate, g = torch.addcmul(weight * sum_dn, bias, sum_d), gate
        if scale is not None:
            dgate, g = dgate * scale, gate * scale
        dy, dkernel = _convolve_backward(torch.ops.aten.sigmoid_backward(dgate, gate), row, kernel)
        dy = dy.to(dtype)
        dbias = torch.addcmul(dy, g, sum_d).sum(0)
        dweight = torch.addcmul(dy * averages, g, sum_dn).sum(0)

        slope = weight * invstd
        on_d = slope * g
        dz: torch.Tensor | None
        if not ctx.needs_input_grad[0]:
            dz = None
        elif not ctx.training:
            dz = torch.addcmul((slope * dy).div_(h * w), d, on_d).to(z_dtype)
        else:
            on_z = (slope * invstd).mul_(dweight).div_(-n * h * w)
            constant = slope * torch.add(dbias / (-n * h * w), dy, alpha=1 / (h * w))
            constant.addcmul_(on_z, mean, value=-1)
            if planes:
                zeros, ones = constant.new_zeros(n * c), constant.new_ones(n * c)
                dz = _batch_norm(
                    z.view(1, n * c, h, w), on_z.flatten().repeat(n), constant.view(-1), zeros, ones, False, 0., 0.
                ).view_as(z)
            else:
                dz = torch.addcmul(constant, z, on_z)
            dz = dz.addcmul_(d, on_d).to(z_dtype)
        return dz, dweight.flatten(), dbias.flatten(), dkernel, dshortcut, *[None] * 7


def _differentiable_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    z, weight, bias, kernel, mean, _, _, _, _, scale, out, running_var = ctx.saved_tensors
    d = grad if out is None else grad * (out > 0)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        bias = ctx.bias + (bias - ctx.bias).detach()  # as it was, with its graph
        # Aliases, at which the differentiation ends: z may depend on the others, and all may have hooks. Unlike a view
        # they have the same strides even with one image, of which batch norm's backward makes something.
        z, weight, bias, kernel = (
            torch.ops.aten.alias(t) if t.requires_grad else t for t in (z, weight, bias, kernel))
        x = reference_tail(
            z, weight, bias, kernel, None if ctx.training else mean, running_var, ctx.eps, scale)
        inputs = [t for t, needed in zip((z, weight, bias, kernel), ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(x, inputs, d, create_graph=create_graph) if inputs else ())
    grads = [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]
    return *grads, d if ctx.needs_input_grad[4] else None, *[None] * 7
