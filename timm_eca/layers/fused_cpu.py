"""The passes of norm and ECA over maps on a CPU, by ATen functions (`timm_eca.layers.fused` has the mathematics).

Maps are (N, C, H, W), values of each image and channel (N, C, 1, 1), those of each channel (C,) or (C, 1, 1).
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['DTYPES', 'backward', 'forward', 'infer']

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of maps
# From this many elements (4 MB of float32) a pass over memory costs more than the small calls that save it.
_LARGE = 2 ** 20
_ONEDNN = 20_480  # from this many elements torch uses oneDNN for a convolution, which is slow for one channel


def infer(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
) -> Tensor:
    """The output in inference."""
    one_dtype = z.dtype in (torch.float32, torch.float64) and all(
        t.dtype == z.dtype for t in (weight, bias, kernel, running_mean, running_var))
    if not one_dtype or torch.is_autocast_enabled('cpu'):  # the modules round in between
        return forward(z, weight, bias, kernel, running_mean, running_var, False, 0., eps)[0]
    if z.numel() < _LARGE:
        # F.batch_norm without its checks, which take as long as the norm of a small map.
        x = torch.batch_norm(z, weight, bias, running_mean, running_var, False, 0., eps, True)
        y = x.mean((2, 3), True)
        # The cost of a small map is the number of calls.
        return x.mul_((y.mul_(kernel) if kernel.numel() == 1 else _convolve_as_layer(y, kernel)).sigmoid_())
    # addcmul rounds once, as batch norm does.
    scale = (running_var + eps).rsqrt_().mul_(weight).view(-1, 1, 1)
    shift = torch.addcmul(bias.view(-1, 1, 1), running_mean.view(-1, 1, 1), scale, value=-1)
    gates = _convolve(torch.addcmul(shift, z.mean((2, 3), True), scale), kernel).sigmoid_()
    return _affine(z, gates * scale, gates * shift)


def forward(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor,
        training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The output, and the tensors for backward: mean, invstd, averages of n (None if frozen), y and gates."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    averages: Tensor | None = None
    if training:
        x, mean, invstd = torch.native_batch_norm(z, weight, bias, running_mean, running_var, True, momentum, eps)
        # Averages of n do not follow from those of x if a scale is zero.
        averages = (z.mean((2, 3), True, dtype=dtype) - mean.view(-1, 1, 1)).mul_(invstd.view(-1, 1, 1))
        y = torch.addcmul(bias.view(-1, 1, 1).to(dtype), averages, weight.view(-1, 1, 1).to(dtype))
        gates = _convolve(y.to(kernel.dtype), kernel).sigmoid()
    else:  # bit for bit as the modules
        x = F.batch_norm(z, running_mean, running_var, weight, bias, eps=eps)
        mean, invstd = running_mean, (running_var.to(dtype) + eps).rsqrt()
        y = x.mean((2, 3), True)
        gates = _convolve_as_layer(y.to(kernel.dtype), kernel).sigmoid()
    return x.mul_(gates.to(x.dtype)), mean, invstd, averages, y, gates.to(dtype)


def backward(
        d: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, kept: Sequence[Any], training: bool,
        eps: float, needs_dz: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of z (or None), weight, bias and kernel."""
    mean, invstd, averages, y, gates = kept
    dtype, z_dtype = gates.dtype, z.dtype
    n, _, h, w = z.shape
    memory_format = torch.contiguous_format if z.is_contiguous() else torch.channels_last
    # float16 and bfloat16 would round, or overflow, in sums whose terms cancel.
    d, z = (t.to(dtype).contiguous(memory_format=memory_format) for t in (d, z))
    weight, bias, mean, invstd = (t.view(-1, 1, 1).to(dtype) for t in (weight, bias, mean, invstd))
    sum_dc, sum_d = _sums(d, z, mean)
    if averages is None:
        averages = (z.mean((2, 3), True) - mean) * invstd
    sum_dn = sum_dc.mul_(invstd)
    dgates = torch.addcmul(weight * sum_dn, bias, sum_d)
    dlogits = torch.ops.aten.sigmoid_backward(dgates, gates)
    dy, dkernel = _convolve_backward(dlogits, y, kernel)
    dy = dy.to(dtype)
    dbias = torch.addcmul(dy, gates, sum_d).sum(0)
    dweight = torch.addcmul(dy * averages, gates, sum_dn).sum(0)

    slope = weight * invstd
    dz: Tensor | None = None
    if needs_dz and not training:
        dz = torch.addcmul((slope * dy).div_(h * w), d, slope * gates).to(z_dtype)
    elif needs_dz:
        on_z = (slope * invstd).mul_(dweight).div_(-n * h * w)
        constant = slope * torch.add(dbias / (-n * h * w), dy, alpha=1 / (h * w))
        constant.addcmul_(on_z, mean, value=-1)
        dz = _affine(z, on_z.expand_as(constant), constant).addcmul_(d, slope * gates).to(z_dtype)
    return dz, dweight.flatten(), dbias.flatten(), dkernel


def _sums(d: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the map of d * (z - mean) and of d; both maps have one memory format."""
    n, c, h, w = z.shape
    if z.is_contiguous():  # as one image of N * C channels
        sum_dz, sum_d = _channel_sums(d.view(1, n * c, h, w), z.view(1, n * c, h, w))
    elif c * h * w >= 2 ** 18:  # image by image, each in the processor's cache
        parts = [_channel_sums(*images) for images in zip(d.split(1), z.split(1))]
        sum_dz, sum_d = (torch.cat(s) for s in zip(*parts))
    else:
        sum_dz, sum_d = (z * d).sum((2, 3)), d.sum((2, 3))
    sum_d = sum_d.view(n, c, 1, 1)
    return torch.addcmul(sum_dz.view(n, c, 1, 1), sum_d, mean, value=-1), sum_d


def _convolve(y: Tensor, kernel: Tensor) -> Tensor:
    """ECA's convolution of averages with the kernel, (1, 1, k), both of one dtype.

    All images are rows of one picture. That is several times faster than one picture for each image, but some
    processors round it in another way.
    """
    n, c, k = y.shape[0], y.shape[1], kernel.shape[-1]
    if n * c > _ONEDNN and n > 1:
        rows = max(1, _ONEDNN // c)
        return torch.cat([_convolve(part, kernel) for part in y.split(rows)])
    return torch.conv2d(y.reshape(1, 1, n, c), kernel.unsqueeze(2), None, 1, (0, k // 2)).view(n, c, 1, 1)


def _convolve_as_layer(y: Tensor, kernel: Tensor) -> Tensor:
    """The convolution, bit for bit as the layer computes it."""
    return torch.conv1d(y.flatten(1).unsqueeze(1), kernel, None, 1, kernel.shape[-1] // 2).view_as(y)


def _convolve_backward(grad: Tensor, y: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the averages and of the kernel from the convolution's."""
    n, c, k = y.shape[0], y.shape[1], kernel.shape[-1]
    if n * c > _ONEDNN and n > 1:
        rows = max(1, _ONEDNN // c)
        parts = [_convolve_backward(*images, kernel) for images in zip(grad.split(rows), y.split(rows))]
        return torch.cat([dy for dy, _ in parts]), torch.stack([dkernel for _, dkernel in parts]).sum(0)
    pictures = (t.to(kernel.dtype).reshape(1, 1, n, c) for t in (grad, y))
    dy, dkernel, _ = torch.ops.aten.convolution_backward(
        *pictures, kernel.unsqueeze(2), None, (1, 1), (0, k // 2), (1, 1), False, (0, 0), 1, (True, True, False))
    return dy.view(n, c, 1, 1), dkernel.view_as(kernel)


def _affine(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * z + shift in one pass, for scales and shifts of each image and channel."""
    if not z.is_contiguous():
        return torch.addcmul(shift, z, scale)
    n, c, h, w = z.shape  # by batch norm, as one image of N * C channels: faster than addcmul on a CPU
    zeros, ones = scale.new_zeros(n * c), scale.new_ones(n * c)
    # Not F.batch_norm, which refuses eps=0 in torch 2.10 and 2.11.
    return torch.batch_norm(
        z.view(1, n * c, h, w), scale.reshape(-1), shift.reshape(-1), zeros, ones, False, 0., 0., True).view_as(z)


def _channel_sums(d: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of d * z and of d of one image, (C,), in one pass: the reduction in batch norm's backward."""
    zeros, ones = z.new_zeros(z.shape[1]), z.new_ones(z.shape[1])
    _, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
        d, z, ones, zeros, ones, zeros, ones, True, 0., (False, True, True))
    return sum_dz, sum_d
