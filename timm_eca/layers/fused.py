"""Batch norm and ECA as one operation.

Module by module, ECA keeps the norm's output for backward, beside what the norm itself keeps, and passes over the
feature map three times more than the norm alone. With z the norm's input, batch normalization is x = weight * n + bias,
where n = (z - mean) * invstd, and the output is

    out = gate * x,    gate = sigmoid(conv(y)),    y = average of x over the map,

with one gate for each image and channel (paper, eq. 5 and 9).

Inference. x is gated in its place, to the bit as by the modules. Large maps leave the caches between one pass and the
next: there y follows from the averages of z, the gates are folded into scale and shift, and one pass writes the output,
the same but for rounding. Gates of 0.5 and a doubled norm give the plain norm's output bit for bit.

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

The passes over maps and ECA's convolution are functions of ATen's on a CPU (`fused_cpu`) and, where it is asked for,
kernels in Triton on CUDA (`fused_triton`).

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""
import functools
import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from timm_eca.layers import fused_cpu
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
        cuda: Fuse on CUDA devices, too, where Triton is installed (it comes with torch on Linux). Its kernels have
            been tested in Triton's interpreter and never run on a GPU: off unless asked for.
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

    It applies in eager PyTorch on a CPU, and on CUDA where that was asked for, whatever is trained or frozen. It does
    not apply where a module has hooks or another `forward`, to other norms and attentions, in TorchScript, FX,
    `torch.compile` and `torch.export`, nor under `torch.func` or a mode of torch's. What it depends on must not change
    between a checkpointed forward pass and its recomputation, since the two ways keep different tensors for backward.

    Args:
        x: Input of the norm, (N, C, H, W).
        norm: The norm.
        eca: The attention.

    Returns:
        The output of the attention, (N, C, H, W), or None: nothing was computed.
    """
    if not _fused or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return None
    backend = _backend(x)
    if backend is None or torch.jit.is_tracing() or not _applies(x, norm, eca):
        return None
    bn: Any = norm
    layer: Any = eca
    weight, bias = bn._parameters['weight'], bn._parameters['bias']
    kernel = layer._modules['conv']._parameters['weight']
    mean, var = bn._buffers['running_mean'], bn._buffers['running_var']
    if backend is fused_cpu and kernel.dtype != x.dtype and not torch.is_autocast_enabled('cpu'):
        return None  # the convolution's to refuse
    if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or bias.requires_grad or kernel.requires_grad):
        if bn.training:
            bn.num_batches_tracked.add_(1)
        return _FusedNormEca.apply(x, weight, bias, kernel, mean, var, bn.training, bn.momentum, bn.eps, backend)
    if bn.training:
        return None  # nothing to gain
    if backend is not fused_cpu:
        return backend.forward(x, weight, bias, kernel, mean, var, False, 0., bn.eps)[0]
    return fused_cpu.infer(x, weight, bias, kernel, mean, var, bn.eps) if _infers(
        x, weight, bias, kernel, mean, var) else None


def _infers(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether a CPU computes the same in inference as the modules do: in other dtypes they may round in between."""
    return (
        x.dtype in (torch.float32, torch.float64) and all(other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled('cpu'))


@functools.cache
def _import_kernels() -> Any:
    try:
        from timm_eca.layers import fused_triton
    except ImportError:  # no Triton
        return None
    return fused_triton


def _backend(z: torch.Tensor) -> Any:
    """The module that has the passes over a map, or None."""
    if _fused_on_cuda and z.device.type == _kernel_device:
        return _import_kernels() if z.dtype in (torch.float32, torch.bfloat16, torch.float16) else None
    return fused_cpu if z.is_cpu else None


_NORMS = (BatchNormAct2d, nn.BatchNorm2d)
# What the classes do, to notice where somebody has replaced it.
_FORWARDS = {kind: kind.forward for kind in (*_NORMS, EfficientChannelAttention, nn.Conv1d)}


def _applies(x: torch.Tensor, norm: nn.Module, eca: nn.Module) -> bool:
    # Asked for each block of each batch, hence in few steps.
    if type(norm) not in _NORMS or type(eca) is not EfficientChannelAttention:
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
    # No image, or perhaps one value for each channel.
    return n * h * w > (4 if norm.training else 0)


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
            backend: Any,
    ) -> torch.Tensor:
        out, *kept = backend.forward(z, weight, bias, kernel, running_mean, running_var, training, momentum, eps)
        # Of the bias the value alone, as batch norm needs none of it: an optimizer may change it before backward.
        ctx.save_for_backward(z, weight, bias.clone(), kernel, *kept, None if training else running_var)
        ctx.training, ctx.eps, ctx.bias, ctx.backend = training, eps, bias, backend
        return out

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(d):
            # `create_graph`, where the gradients are to be differentiable themselves, or a batch of gradients.
            return _differentiable_backward(ctx, d)
        z, weight, bias, kernel, mean, invstd, averages, y, gates, _ = ctx.saved_tensors
        backend, dtype, z_dtype = ctx.backend, gates.dtype, z.dtype
        n, _, h, w = z.shape
        if backend is fused_cpu:
            # In float16 and bfloat16 what cancels below would be rounded, or overflow, before it does.
            z, d = z.to(dtype), d.to(dtype)
        memory_format = torch.contiguous_format if z.is_contiguous() else torch.channels_last
        d, z = (t.contiguous(memory_format=memory_format) for t in (d, z))
        weight, bias, mean, invstd = (t.view(-1, 1, 1).to(dtype) for t in (weight, bias, mean, invstd))
        sum_dc, sum_d = backend.sums(d, z, mean)
        if averages is None:
            averages = (z.mean((2, 3), True) - mean) * invstd
        sum_dn = sum_dc.mul_(invstd)
        dgates = torch.addcmul(weight * sum_dn, bias, sum_d)
        # What autograd itself calls for sigmoid.
        dlogits = torch.ops.aten.sigmoid_backward(dgates, gates)
        dy, dkernel = backend.convolve_backward(dlogits, y, kernel)
        dy = dy.to(dtype)
        dbias = torch.addcmul(dy, gates, sum_d).sum(0)
        dweight = torch.addcmul(dy * averages, gates, sum_dn).sum(0)

        slope = weight * invstd
        on_d = slope * gates
        dz: torch.Tensor | None
        if not ctx.needs_input_grad[0]:
            dz = None
        elif not ctx.training:
            dz = backend.combine((slope * dy).div_(h * w), d=d, on_d=on_d).to(z_dtype)
        else:
            on_z = (slope * invstd).mul_(dweight).div_(-n * h * w)
            constant = slope * torch.add(dbias / (-n * h * w), dy, alpha=1 / (h * w))
            dz = backend.combine(constant, z, mean, on_z, d, on_d).to(z_dtype)
        return dz, dweight.flatten(), dbias.flatten(), dkernel, *[None] * 6


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
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), *[None] * 6
