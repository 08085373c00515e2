"""Batch norm and ECA as one operation.

Module by module, ECA keeps the norm's output for backward, beside what the norm itself keeps, and passes over the
feature map three times more than the norm alone. With z the norm's input, batch normalization is x = weight * n + bias,
where n = (z - mean) * invstd, and the output is

    out = gate * x,    gate = sigmoid(conv(y)),    y = average of x over the map,

with one gate for each image and channel (paper, eq. 5 and 9).

Inference. The modules are called, but for large maps, which would leave the caches between one and the next: there y
follows from the averages of z, the gates are folded into scale and shift, and one pass writes the output, the same but
for rounding. Gates of 0.5 and a doubled norm give the plain norm's output bit for bit.

Forward in training. Batch norm computes x, and x is gated in its place. y follows from the averages of n, which
backward needs as well. Nothing is kept but z, which the plain norm keeps, too, and vectors with one value for each
image and channel. Where the norm's statistics are frozen, all is computed as the modules do, to the bit.

Backward. With d the output's gradient, all sums over the map that the gates and the norm need follow from two, sum(d)
and sum(d * n), and from the averages of n:

    dgate = weight * sum(d * n) + bias * sum(d),    dy = conv'(dgate * gate * (1 - gate)),
    dx    = gate * d + dy / (H * W),
    dbias   = sum(dx)     = sum over images of  gate * sum(d)     + dy,
    dweight = sum(dx * n) = sum over images of  gate * sum(d * n) + dy * average of n,
    dz    = weight * invstd * (dx - (dbias + n * dweight) / M),    M = N * H * W,

the last without its fraction where the norm's statistics are frozen. dz is linear in d and z, with coefficients for
each image and channel: one pass to reduce, one to write.

On CUDA, where it is asked for, the passes over maps and ECA's convolution are kernels in Triton (`fused_triton`), in
training and inference alike.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""
import functools
import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from timm_eca.layers.eager import AVAILABLE, is_batched, is_untouched, is_watched
from timm_eca.layers.eca import EfficientChannelAttention, is_plain_conv

__all__ = ['fused_norm_eca', 'reference_norm_eca', 'set_fused']

_fused = AVAILABLE and os.environ.get('TIMM_ECA_FUSED', '1') != '0'
_fused_on_cuda = False
_kernel_device = 'cuda'  # where the kernels of Triton run; tests and benchmarks have them run elsewhere


def set_fused(enable: bool = True, cuda: bool = False) -> None:
    """Switches fused norm and ECA on or off; it is on unless the environment variable `TIMM_ECA_FUSED` is 0.

    Models compute the same without it, module by module, in more time and memory.

    Args:
        enable: Fuse on a CPU.
        cuda: Fuse on CUDA devices, too, with kernels in Triton where Triton is installed (it comes with torch on
            Linux). They have been tested in Triton's interpreter and never been timed on a GPU: off unless asked for.
    """
    global _fused, _fused_on_cuda
    _fused, _fused_on_cuda = AVAILABLE and enable, cuda


def reference_norm_eca(
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kernel: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        eps: float,
) -> torch.Tensor:
    """What the fused operation computes, in plain differentiable operations.

    Args:
        z: The norm's input, (N, C, H, W).
        weight: Scale of the norm, (C,).
        bias: Shift of the norm, (C,).
        kernel: ECA's kernel, (1, 1, k).
        mean: Frozen mean of the norm, (C,); None for the batch's.
        var: Frozen variance of the norm, (C,); None for the batch's.
        eps: The norm's constant below the root.

    Returns:
        The gated output of the norm, (N, C, H, W).
    """
    x = F.batch_norm(z, mean, var, weight, bias, training=mean is None, eps=eps)
    y = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1).to(kernel.dtype)
    gate = F.conv1d(y, kernel, padding=kernel.shape[-1] // 2).sigmoid()
    return x * gate.squeeze(1).unsqueeze(-1).unsqueeze(-1).to(x.dtype)


def fused_norm_eca(x: torch.Tensor, norm: nn.Module, eca: nn.Module) -> torch.Tensor | None:
    """Batch norm and ECA in the least time and memory, or None where that is not known to be what the modules do.

    It applies in eager PyTorch on a CPU, whatever is trained or frozen. It does not apply where a module has hooks or
    another `forward`, to other norms and attentions, in TorchScript, FX, `torch.compile` and `torch.export`, nor under
    `torch.func` or a mode of torch's. What it depends on must not change between a checkpointed forward pass and its
    recomputation, since the two ways keep different tensors for backward.

    Args:
        x: Input of the norm, (N, C, H, W).
        norm: The norm.
        eca: The attention.

    Returns:
        The output of the attention, (N, C, H, W), or None: nothing was computed.
    """
    if not _fused or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return None
    if not torch.is_grad_enabled() and _kernels(x) is None and (norm.training or x.numel() < _LARGE):
        return None  # nothing to gain
    if torch.jit.is_tracing() or not _applies(x, norm, eca):
        return None
    bn: Any = norm
    layer: Any = eca
    weight, bias = bn._parameters['weight'], bn._parameters['bias']
    kernel = layer._modules['conv']._parameters['weight']
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or bias.requires_grad or kernel.requires_grad)
    kernels = _kernels(x)
    if differentiable or kernels is not None:
        if bn.training:
            bn.num_batches_tracked.add_(1)
        args = (x, weight, bias, kernel, bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps)
        return _FusedNormEca.apply(*args) if differentiable else _forward_by_kernels(kernels, *args)[0]
    same_dtype = weight.dtype == bias.dtype == kernel.dtype == x.dtype
    if bn.training or x.numel() < _LARGE or not same_dtype or x.dtype not in (torch.float32, torch.float64):
        return None
    return _folded(x, weight, bias, kernel, bn.running_mean, bn.running_var, bn.eps)


# Elements of a map from which on folding saves time: 4 MB of float32. Below it the checks alone cost as much.
_LARGE = 2 ** 20
_NORMS = (BatchNormAct2d, nn.BatchNorm2d)
# What the classes do, to notice where somebody has replaced it.
_FORWARDS = {kind: kind.forward for kind in (*_NORMS, EfficientChannelAttention, nn.Conv1d)}


def _applies(x: torch.Tensor, norm: nn.Module, eca: nn.Module) -> bool:
    # Asked for each block of each batch, hence in few steps.
    if type(x) is not torch.Tensor or type(norm) not in _NORMS or type(eca) is not EfficientChannelAttention:
        return False
    if not (x.is_cpu or (_fused_on_cuda and x.device.type == _kernel_device)):
        return False
    if x.ndim != 4 or x.layout is not torch.strided:
        return False
    if is_watched():
        return False
    gate_conv: Any = eca._modules['conv']
    if not is_plain_conv(gate_conv):
        return False
    for module in (norm, eca, gate_conv):
        if not is_untouched(module) or _FORWARDS[type(module)] is not type(module).forward:
            return False
    for module in norm._modules.values():  # dropout and activation of a BatchNormAct2d
        if type(module) is not nn.Identity or not is_untouched(module):
            return False
    parameters, buffers = norm._parameters, norm._buffers
    for tensor in (parameters.get('weight'), parameters.get('bias'), gate_conv._parameters.get('weight')):
        if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
            return False
    if not norm.track_running_stats or norm.momentum is None:
        return False
    if buffers.get('num_batches_tracked') is None:
        return False
    # What batch norm and convolution refuse, theirs to refuse: the functions called here don't check it.
    n, c, h, w = x.shape
    for tensor in (parameters['weight'], parameters['bias'], buffers.get('running_mean'), buffers.get('running_var')):
        if tensor is None or tensor.numel() != c:
            return False
    if gate_conv.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type) and _kernels(x) is None:
        return False
    # No image, or perhaps one value for each channel.
    return n * h * w > (4 if norm.training else 0)


def _folded(
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kernel: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        eps: float,
) -> torch.Tensor:
    # Rounded as batch norm rounds them, which multiplies and adds at once.
    scale = (var + eps).rsqrt_().mul_(weight).view(-1, 1, 1)
    shift = torch.addcmul(bias.view(-1, 1, 1), mean.view(-1, 1, 1), scale, value=-1)
    gates = _convolve(torch.addcmul(shift, F.adaptive_avg_pool2d(z, 1), scale), kernel).sigmoid().to(z.dtype)
    return _affine(z, gates * scale, gates * shift)


def _affine(z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """scale * z + shift in one pass, for scales and shifts of each image and channel, (N, C, 1, 1)."""
    if not z.is_contiguous():
        return torch.addcmul(shift, z, scale)
    n, c, h, w = z.shape  # by batch norm, as one image of N * C channels: faster than addcmul on a CPU
    zeros, ones = scale.new_zeros(n * c), scale.new_ones(n * c)
    return F.batch_norm(
        z.view(1, n * c, h, w), zeros, ones, scale.reshape(-1), shift.reshape(-1), eps=0.).view_as(z)


def _averages(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The averages over the map, (N, C, 1, 1)."""
    # The pooling kernel, unlike mean, is as fast on channels_last as on contiguous tensors on a CPU.
    return F.adaptive_avg_pool2d(z, 1) if z.dtype == dtype else z.mean((2, 3), keepdim=True, dtype=dtype)


def _rows(y: torch.Tensor, radius: int) -> torch.Tensor:
    """Values of all images in a row, (1, 1, N * (C + radius)), zeros between.

    One long convolution is several times faster on a CPU than many short ones.
    """
    y = y.flatten(1)
    return (F.pad(y, (0, radius)) if len(y) > 1 else y).reshape(1, 1, -1)


def _convolve(y: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """ECA's convolution of averages, (N, C, 1, 1)."""
    n, c, radius = y.shape[0], y.shape[1], kernel.shape[-1] // 2
    row = torch.conv1d(_rows(y.to(kernel.dtype), radius), kernel, None, 1, radius)
    return row.view(n, -1)[:, :c, None, None]


def _convolve_backward(
        grad: torch.Tensor,
        y: torch.Tensor,
        kernel: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the averages, (N, C, 1, 1), and of the kernel."""
    n, c, radius = y.shape[0], y.shape[1], kernel.shape[-1] // 2
    grad, y = grad.to(kernel.dtype), y.to(kernel.dtype)
    if radius == 0:
        return grad * kernel, (grad * y).sum().view_as(kernel)
    dy, dkernel, _ = torch.ops.aten.convolution_backward(
        _rows(grad, radius), _rows(y, radius), kernel, None, (1,), (radius,), (1,), False, (0,), 1,
        (True, True, False))
    return dy.view(n, -1)[:, :c, None, None], dkernel


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


def _combine(
        constant: torch.Tensor,
        z: Any = None,
        mean: Any = None,
        on_z: Any = None,
        d: Any = None,
        on_d: Any = None,
) -> torch.Tensor:
    """on_z * (z - mean) + on_d * d + constant."""
    if z is None:
        return torch.addcmul(constant, d, on_d)
    return _affine(z, on_z.expand_as(constant), constant.addcmul_(on_z, mean, value=-1)).addcmul_(d, on_d)


@functools.cache
def _import_kernels() -> Any:
    try:
        from timm_eca.layers import fused_triton
    except ImportError:  # no Triton
        return None
    return fused_triton


def _kernels(z: torch.Tensor) -> Any:
    """The module of Triton's kernels where there are some for a tensor, or None."""
    if not _fused_on_cuda or z.device.type != _kernel_device:
        return None
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return _import_kernels()


def _forward_by_kernels(
        kernels: Any,
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kernel: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        training: bool,
        momentum: float,
        eps: float,
) -> tuple[torch.Tensor, ...]:
    """The output, and what backward needs: mean, invstd, averages of n, y and gates."""
    z = z.contiguous(memory_format=_format(z))
    averages, mean, var = kernels.moments(z)
    if training:
        m = z.numel() // z.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (m / (m - 1))).to(running_var.dtype), momentum)
    else:
        mean, var = running_mean, running_var.float()
    invstd = (var + eps).rsqrt_()
    averages = averages.sub_(mean.view(-1, 1, 1)).mul_(invstd.view(-1, 1, 1))
    weight, bias = weight.view(-1, 1, 1).float(), bias.view(-1, 1, 1).float()
    y = torch.addcmul(bias, averages, weight)
    gates = kernels.convolve(y, kernel).sigmoid_()
    out = kernels.combine(gates * bias, z, mean, gates * (weight * invstd.view(-1, 1, 1)))
    return out, mean, invstd, averages, y, gates


def _format(z: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if z.is_contiguous() else torch.channels_last


class _FusedNormEca(torch.autograd.Function):
    # Values of each image and channel are (N, C, 1, 1) below, of each channel (C, 1, 1).

    @staticmethod
    def forward(
            ctx: Any,
            z: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            kernel: torch.Tensor,
            running_mean: torch.Tensor,
            running_var: torch.Tensor,
            training: bool,
            momentum: float,
            eps: float,
    ) -> torch.Tensor:
        dtype = torch.promote_types(z.dtype, torch.float32)
        kernels = _kernels(z)
        if kernels is not None:
            out, mean, invstd, averages, y, gates = _forward_by_kernels(
                kernels, z, weight, bias, kernel, running_mean, running_var, training, momentum, eps)
        elif training:
            x, mean, invstd = torch.native_batch_norm(z, weight, bias, running_mean, running_var, True, momentum, eps)
            # Of n, not of x: they could not be told from those of x where a scale is zero.
            averages = (_averages(z, dtype) - mean.view(-1, 1, 1)).mul_(invstd.view(-1, 1, 1))
            y = torch.addcmul(bias.view(-1, 1, 1).to(dtype), averages, weight.view(-1, 1, 1).to(dtype))
            gates = _convolve(y, kernel).sigmoid()
        else:  # as the modules do it, to the bit
            x = F.batch_norm(z, running_mean, running_var, weight, bias, eps=eps)
            mean, invstd, averages = running_mean, (running_var.to(dtype) + eps).rsqrt(), None
            y = F.adaptive_avg_pool2d(x, 1)
            logits = F.conv1d(y.view(y.shape[0], 1, -1), kernel, padding=kernel.shape[-1] // 2)
            gates = logits.sigmoid().view_as(y)
        # Of the bias the value alone, as batch norm needs none of it: an optimizer may change it before backward.
        ctx.save_for_backward(
            z, weight, bias.clone(), kernel, mean, invstd, averages, y, gates.to(dtype),
            None if training else running_var)
        ctx.training, ctx.eps, ctx.bias = training, eps, bias
        return out if kernels is not None else x.mul_(gates.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(d):
            # `create_graph`, where the gradients are to be differentiable themselves, or a batch of gradients.
            return _differentiable_backward(ctx, d)
        z, weight, bias, kernel, mean, invstd, averages, y, gates, _ = ctx.saved_tensors
        dtype, z_dtype = gates.dtype, z.dtype
        n, _, h, w = z.shape
        kernels = _kernels(z)
        if kernels is None:
            # In float16 and bfloat16 what cancels below would be rounded, or overflow, before it does.
            z, d = z.to(dtype), d.to(dtype)
        d, z = (t.contiguous(memory_format=_format(z)) for t in (d, z))
        weight, bias, mean, invstd = (t.view(-1, 1, 1).to(dtype) for t in (weight, bias, mean, invstd))
        if kernels is not None:
            sum_dc, sum_d = kernels.sums(d, z, mean)
        else:
            sum_dz, sum_d = _sums(d, z)
            sum_dc = torch.addcmul(sum_dz, sum_d, mean, value=-1)
            if averages is None:
                averages = (_averages(z, dtype) - mean) * invstd
        sum_dn = sum_dc.mul_(invstd)
        dgates = torch.addcmul(weight * sum_dn, bias, sum_d)
        # What autograd itself calls for sigmoid.
        dlogits = torch.ops.aten.sigmoid_backward(dgates, gates)
        dy, dkernel = (kernels.convolve_backward if kernels is not None else _convolve_backward)(dlogits, y, kernel)
        dy = dy.to(dtype)
        dbias = torch.addcmul(dy, gates, sum_d).sum(0)
        dweight = torch.addcmul(dy * averages, gates, sum_dn).sum(0)

        slope = weight * invstd
        on_d = slope * gates
        combine = kernels.combine if kernels is not None else _combine
        dz: torch.Tensor | None
        if not ctx.needs_input_grad[0]:
            dz = None
        elif not ctx.training:
            dz = combine((slope * dy).div_(h * w), d=d, on_d=on_d).to(z_dtype)
        else:
            on_z = (slope * invstd).mul_(dweight).div_(-n * h * w)
            constant = slope * torch.add(dbias / (-n * h * w), dy, alpha=1 / (h * w))
            dz = combine(constant, z, mean, on_z, d, on_d).to(z_dtype)
        return dz, dweight.flatten(), dbias.flatten(), dkernel, *[None] * 5


def _differentiable_backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    z, weight, bias, kernel, mean, *_, running_var = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        bias = ctx.bias + (bias - ctx.bias).detach()  # as it was, with its graph
        # Aliases, at which the differentiation ends: z may depend on the others, and all may have hooks. Unlike a view
        # they have the same strides even with one image, of which batch norm's backward makes something.
        z, weight, bias, kernel = (
            torch.ops.aten.alias(t) if t.requires_grad else t for t in (z, weight, bias, kernel))
        x = reference_norm_eca(z, weight, bias, kernel, None if ctx.training else mean, running_var, ctx.eps)
        inputs = [t for t, needed in zip((z, weight, bias, kernel), ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(x, inputs, d, create_graph=create_graph) if inputs else ())
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), *[None] * 5
