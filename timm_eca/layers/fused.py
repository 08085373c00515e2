"""Batch norm and ECA as one operation.

Module by module, ECA keeps one more map for backward, the norm's output, and passes over the feature map three times
more than the norm alone. With z the norm's input, batch normalization is x = weight * n + bias, where
n = (z - mean) * invstd, and the output is

    out = gate * x,    gate = sigmoid(conv(y)),    y = average of x over the map,

with one gate for each image and channel (paper, eq. 5 and 9). `timm_eca.layers.eager.may_fuse` decides for each call
whether the operation may be used.

Forward in inference, on a CPU. x is multiplied by its gates in place, bit for bit as by the modules. Large maps do not
stay in the caches between two passes: there y follows from the averages of z, the gates are folded into scale and
shift, and one pass writes the output. It is the same but for rounding. Gates of 0.5 and a doubled norm give the plain
norm's output bit for bit.

Forward in training, on a CPU. Batch norm computes x, and x is multiplied by its gates in place. y follows from the
averages of n, which backward needs, too. The operation keeps z, as the plain norm does, and vectors with one value for
each image and channel. With frozen statistics the output is that of the modules, bit for bit.

Backward. With d the output's gradient, all sums over the map that the gates and the norm need follow from two, sum(d)
and sum(d * n), and from the averages of n:

    dgate = weight * sum(d * n) + bias * sum(d),    dy = conv'(dgate * gate * (1 - gate)),
    dx    = gate * d + dy / (H * W),
    dbias   = sum(dx)     = sum over images of  gate * sum(d)     + dy,
    dweight = sum(dx * n) = sum over images of  gate * sum(d * n) + dy * average of n,
    dz    = weight * invstd * (dx - (dbias + n * dweight) / M),    M = N * H * W,

without the fraction if the statistics are frozen. dz is linear in d and z, with coefficients for each image and
channel: one pass to reduce, one to write.

On a CPU the operation is made of ATen functions (`fused_cpu`), on NVIDIA GPUs, if asked for, of Triton kernels
(`fused_triton`). A GPU always makes two passes over z. Its results are those of the modules but for rounding.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""
import logging
import os
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from timm_eca.layers import fused_cpu
from timm_eca.layers.eager import AVAILABLE, is_batched, is_watched, may_fuse

__all__ = ['backend_of', 'fused_norm_eca', 'reference_norm_eca', 'set_fused']

_logger = logging.getLogger(__name__)
_on = {'cpu': os.environ.get('TIMM_ECA_FUSED', '1') != '0', 'cuda': False}  # by type of device


def set_fused(cpu: bool | None = None, cuda: bool | None = None) -> None:
    """Switches fused norm and ECA on or off, on CPUs and on NVIDIA GPUs. None leaves a switch as it is.

    Without it models compute the same but for rounding, module by module, in more memory and usually more time.

    Args:
        cpu: Fuse on CPUs: on unless the environment variable `TIMM_ECA_FUSED` is 0.
        cuda: Fuse on NVIDIA GPUs (Ampere or later), by kernels in Triton: off unless asked for. The first calls compile
            kernels, which takes seconds (so call a model before you capture it in a CUDA graph). Triton keeps them on
            disk. Where Triton doesn't run, a warning says so, and the modules run.
    """
    for device, on in (('cpu', cpu), ('cuda', cuda)):
        if on is not None:
            _on[device] = on


def backend_of(device: torch.device) -> Any:
    """The module that computes the operation on a device, or None: then norm and ECA run one by one."""
    if not _on.get(device.type):
        return None
    return fused_cpu if device.type == 'cpu' else _triton_on(device)


@cache
def _triton_on(device: torch.device) -> Any:
    """The Triton kernels, if they run on this GPU. AMD's were never tried, and Triton needs Ampere or later."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    vector = torch.ones(1, device=device)  # not below: running out of memory says nothing about Triton
    try:
        from timm_eca.layers import fused_triton
        fused_triton.infer(vector.view(1, 1, 1, 1), vector, vector, vector.view(1, 1, 1), vector, vector, 1e-5)
    except Exception as e:  # Triton is missing, finds no C compiler, doesn't know the GPU, can't write its cache, ...
        _logger.warning(f'Norm and ECA are not fused on {device}, since Triton does not run there: {e}')
        return None
    return fused_triton


def fused_norm_eca(x: Tensor, norm: nn.Module, eca: nn.Module) -> Tensor | None:
    """The output of ECA for the input x of the norm, both (N, C, H, W), or None if the modules must be called.

    The modules are called for other norms and attentions, for modules with hooks or another `forward`, in TorchScript,
    FX, `torch.compile` and `torch.export`, and under `torch.func` or a mode of torch. None of this may change between a
    checkpointed forward pass and its recomputation, since the two ways keep different tensors for backward.

    Checkpointing gives equal bits, with one exception on a CPU: frozen norms under reentrant checkpointing. The first
    pass runs as inference there, which rounds maps of 2^20 elements or more in another way.
    """
    # FX passes proxies. Nothing may watch the first call either: it tries Triton.
    if (not AVAILABLE or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or is_watched()):
        return None
    backend = backend_of(x.device)
    if backend is None or not may_fuse(x, norm, eca, backend.DTYPES):
        return None
    bn: Any = norm
    layer: Any = eca
    weight, bias = bn._parameters['weight'], bn._parameters['bias']
    kernel = layer._modules['conv']._parameters['weight']
    mean, var = bn._buffers['running_mean'], bn._buffers['running_var']
    if bn.training:
        bn.num_batches_tracked.add_(1)
    elif not torch.is_grad_enabled() or not (
            x.requires_grad or weight.requires_grad or bias.requires_grad or kernel.requires_grad):
        return backend.infer(x, weight, bias, kernel, mean, var, bn.eps)
    return _FusedNormEca.apply(x, weight, bias, kernel, mean, var, bn.training, bn.momentum, bn.eps, backend)


class _FusedNormEca(torch.autograd.Function):
    # Shapes below: (N, C, 1, 1) for values of each image and channel, (C, 1, 1) for those of each channel.

    @staticmethod
    def forward(
            ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor,
            running_var: Tensor, training: bool, momentum: float, eps: float, backend: Any,
    ) -> Tensor:
        out, *kept = backend.forward(z, weight, bias, kernel, running_mean, running_var, training, momentum, eps)
        # Save a copy of the bias: an optimizer may change it before backward.
        ctx.save_for_backward(z, weight, bias.clone(), kernel, *kept, None if training else running_var)
        ctx.training, ctx.eps, ctx.bias, ctx.backend = training, eps, bias, backend
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(d):
            # The gradients must be differentiable themselves (`create_graph`), or come in a batch.
            return _differentiable_backward(ctx, d)
        z, weight, bias, kernel, *kept, _ = ctx.saved_tensors
        gradients = ctx.backend.backward(
            d, z, weight, bias, kernel, kept, ctx.training, ctx.eps, ctx.needs_input_grad[0])
        return *gradients, *[None] * 6


def _differentiable_backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, bias, kernel, mean, *_, running_var = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        bias = ctx.bias + (bias - ctx.bias).detach()  # the saved value, with the graph of the parameter
        # Differentiation ends at aliases: z may depend on the others, and all may have hooks. A view won't do: with one
        # image its strides change, and batch norm's backward depends on them.
        z, weight, bias, kernel = (
            torch.ops.aten.alias(t) if t.requires_grad else t for t in (z, weight, bias, kernel))
        x = reference_norm_eca(z, weight, bias, kernel, None if ctx.training else mean, running_var, ctx.eps)
        inputs = [t for t, needed in zip((z, weight, bias, kernel), ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(x, inputs, d, create_graph=create_graph) if inputs else ())
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), *[None] * 6


def reference_norm_eca(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, mean: Tensor | None, var: Tensor | None, eps: float,
) -> Tensor:
    """Computes the same as the fused operation, (N, C, H, W), in plain differentiable operations.

    z is (N, C, H, W), the kernel (1, 1, k), all others (C,). Without mean and var the norm uses the batch's.
    """
    x = F.batch_norm(z, mean, var, weight, bias, training=mean is None, eps=eps)
    y = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1).to(kernel.dtype)
    gate = F.conv1d(y, kernel, padding=kernel.shape[-1] // 2).sigmoid()
    return x * gate.squeeze(1).unsqueeze(-1).unsqueeze(-1).to(x.dtype)
