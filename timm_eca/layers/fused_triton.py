"""Kernels in Triton for batch norm and ECA as one operation, on GPUs (`timm_eca.layers.fused` has the mathematics).

Only `set_fused(cuda=True)` imports this module: Triton is no dependency of the package.

Traffic. A GPU computes far faster than it reads and writes the (N, C, H, W) maps, so count the passes over maps:

    forward, training     `moments` reads z; `combine` reads z and writes the output:              2 reads, 1 write
    backward, training    `sums` reads the gradient and z; `combine` reads both and writes dz:     4 reads, 1 write
    backward, frozen      the same, but `combine` needs no z:                                      3 reads, 1 write
    inference             as forward in training:                                                  2 reads, 1 write

In training the plain batch norm makes the same passes, since it reads z once for the statistics. With frozen statistics
it needs no averages, so it makes one read less in forward. All other tensors have one value for each image and channel:
1 / (H * W) of a map.

Accuracy. Maps may be float32, bfloat16 or float16; all sums are float32. Variances come from Welford's recurrence, and
all other sums and products use the distance of z from the mean, so no digits cancel if z is far from zero.

Determinism. No atomics. Each program reduces one chunk of an image, for a block of channels; a second stage adds up the
chunks. The chunks of a shape are of equal size and do not depend on the device.

Block sizes are reasoned, not tuned: no GPU was at hand. The kernels have run only in Triton's interpreter
(`TRITON_INTERPRET=1`).
"""
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['DTYPES', 'combine', 'convolve', 'convolve_backward', 'forward', 'infer', 'moments', 'sums']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of maps

_TILE = 2048  # values that a program holds at a time, 16 for each thread of four warps
_PROGRAMS = 2048  # the least number wanted, for GPUs of up to some 150 multiprocessors


@triton.jit
def _place(channels, length, chunks, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """The program's row of results, its image, its channels, and where their chunks begin in a map."""
    row = tl.program_id(0)
    image = row // chunks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # In 64 bits: a batch may have more than 2^31 values.
    offsets = image.to(tl.int64) * channels * length * chunks + row % chunks * length * stride_p + c * stride_c
    return row, image, c, offsets[:, None]


@triton.jit
def _moments_kernel(
        z, means, m2s, channels, length, chunks, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    row, _, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, length, BLOCK_P):
        inside = start + p < length
        mask = (c < channels)[:, None] & inside[None, :]
        x = tl.load(z + offsets + (start + p)[None, :] * stride_p, mask, other=0.).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(mask, x - mean, 0.)
        mean += delta / tl.maximum(count, 1.)[None, :]
        m2 += delta * (x - mean)
    chunk_mean = tl.sum(mean * count[None, :], 1) / length
    off = mean - chunk_mean[:, None]
    chunk_m2 = tl.sum(m2 + off * off * count[None, :], 1)
    tl.store(means + row * channels + c, chunk_mean, c < channels)
    tl.store(m2s + row * channels + c, chunk_m2, c < channels)


@triton.jit
def _sums_kernel(
        d, z, mean, sums_dz, sums_d, channels, length, chunks, stride_c, stride_p,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    row, _, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    center = tl.load(mean + c, c < channels, other=0.).to(tl.float32)
    sum_dz = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_d = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        at = offsets + (start + p)[None, :] * stride_p
        grad = tl.load(d + at, mask, other=0.).to(tl.float32)
        x = tl.load(z + at, mask, other=0.).to(tl.float32)
        sum_dz += grad * (x - center[:, None])  # beyond the mask the gradient is zero
        sum_d += grad
    tl.store(sums_dz + row * channels + c, tl.sum(sum_dz, 1), c < channels)
    tl.store(sums_d + row * channels + c, tl.sum(sum_d, 1), c < channels)


@triton.jit
def _combine_kernel(
        z, mean, on_z, d, on_d, constant, out, channels, length, chunks, stride_c, stride_p, on_z_stride,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    _, image, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    shift = tl.load(constant + image * channels + c, c < channels, other=0.)[:, None]
    if z is not None:
        center = tl.load(mean + c, c < channels, other=0.).to(tl.float32)[:, None]
        z_factor = tl.load(on_z + image * on_z_stride + c, c < channels, other=0.)[:, None]
    if d is not None:
        d_factor = tl.load(on_d + image * channels + c, c < channels, other=0.)[:, None]
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        at = offsets + (start + p)[None, :] * stride_p
        value = tl.zeros([BLOCK_C, BLOCK_P], tl.float32) + shift
        if z is not None:
            value += (tl.load(z + at, mask, other=0.).to(tl.float32) - center) * z_factor
        if d is not None:
            value += tl.load(d + at, mask, other=0.).to(tl.float32) * d_factor
        tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _convolve_kernel(y, kernel, out, channels, K: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    image, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(K):
        neighbour = c + (K // 2 - i if FLIP else i - K // 2)
        values = tl.load(y + image * channels + neighbour, (neighbour >= 0) & (neighbour < channels), other=0.)
        total += values * tl.load(kernel + i).to(tl.float32)
    tl.store(out + image * channels + c, total, c < channels)


@triton.jit
def _correlate_kernel(grad, y, out, channels, K: tl.constexpr, BLOCK: tl.constexpr):
    image, block = tl.program_id(0), tl.program_id(1)
    c = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(grad + image * channels + c, c < channels, other=0.)
    for i in range(K):
        neighbour = c + i - K // 2
        others = tl.load(y + image * channels + neighbour, (neighbour >= 0) & (neighbour < channels), other=0.)
        tl.store(out + (image * tl.num_programs(1) + block) * K + i, tl.sum(values * others, 0))


@cache
def _layout(n: int, c: int, positions: int, channels_last: bool) -> tuple[int, int, int]:
    """Chunks of a map, and channels and positions of a tile, which is longest in the contiguous direction."""
    if channels_last:
        block_c = min(64, triton.next_power_of_2(c))
        block_p = min(_TILE // block_c, triton.next_power_of_2(positions))
    else:
        block_p = min(1024, triton.next_power_of_2(positions))
        block_c = min(_TILE // block_p, triton.next_power_of_2(c))
    wanted = min(triton.cdiv(_PROGRAMS, n * triton.cdiv(c, block_c)), positions // block_p)
    aligned = math.gcd(positions, 16)
    chunks = max((i for i in range(1, wanted + 1) if positions % (i * aligned) == 0), default=1)
    return chunks, block_c, block_p


def _launch(kernel: Any, grid: tuple[int, ...], reads: Sequence[Any], writes: Sequence[Any], *args: Any) -> None:
    """Runs a kernel that reads or writes each of these tensors once."""
    with torch.cuda.device_of(writes[0]):
        kernel[grid](*reads, *writes, *args)


def _launch_on_map(
        kernel: Any,
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor] | None,
        like: Tensor,
        *args: int,
) -> Sequence[Tensor]:
    """Runs a kernel on maps with the strides of `like`. Without `writes` it fills two tensors, (N, chunks, C)."""
    n, c, h, w = like.shape
    strides = (h * w, 1) if like.is_contiguous() else (1, c)
    chunks, block_c, block_p = _layout(n, c, h * w, strides[0] == 1)
    if writes is None:
        writes = [like.new_empty(n, chunks, c, dtype=torch.float32) for _ in range(2)]
    grid = (n * chunks, triton.cdiv(c, block_c))
    _launch(kernel, grid, reads, writes, c, h * w // chunks, chunks, *strides, *args, block_c, block_p)
    return writes


def infer(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
) -> Tensor:
    """The output in inference."""
    return forward(z, weight, bias, kernel, running_mean, running_var, False, 0., eps)[0]


def forward(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor,
        training: bool, momentum: float, eps: float,
) -> tuple[Tensor, ...]:
    """The output, and for backward: mean, invstd, averages of n, y and gates."""
    z = z.contiguous(memory_format=torch.contiguous_format if z.is_contiguous() else torch.channels_last)
    averages, mean, var = moments(z)
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
    gates = convolve(y, kernel).sigmoid_()
    out = combine(gates * bias, z, mean, gates * (weight * invstd.view(-1, 1, 1)))
    return out, mean, invstd, averages, y, gates


def moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The averages of each image's channels, (N, C, 1, 1), and the batch's mean and biased variance, (C,).

    Maps are (N, C, H, W), dense, and contiguous or channels_last. The results are float32.
    """
    means, m2s = _launch_on_map(_moments_kernel, [z], None, z)
    var, mean = torch.var_mean(means, (0, 1), correction=0)  # of chunks of one size
    return means.mean(1)[..., None, None], mean, var.add_(m2s.sum((0, 1)), alpha=z.shape[1] / z.numel())


def sums(d: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the map of d * (z - mean) and of d, (N, C, 1, 1), for a mean of each channel, (C,)."""
    sum_dz, sum_d = _launch_on_map(_sums_kernel, [d, z, mean], None, z)
    return sum_dz.sum(1)[..., None, None], sum_d.sum(1)[..., None, None]


def combine(
        constant: Tensor, z: Tensor | None = None, mean: Tensor | None = None, on_z: Tensor | None = None,
        d: Tensor | None = None, on_d: Tensor | None = None,
) -> Tensor:
    """The map on_z * (z - mean) + on_d * d + constant, without the terms that are None.

    The mean is (C,), on_z (C, 1, 1) or (N, C, 1, 1), the other factors and the constant are (N, C, 1, 1). All but the
    mean are float32.
    """
    like = z if z is not None else d
    assert like is not None
    out = torch.empty_like(like)
    stride = 0 if on_z is None or on_z.ndim == 3 else like.shape[1]
    _launch_on_map(_combine_kernel, [z, mean, on_z, d, on_d, constant], [out], like, stride)
    return out


def convolve(y: Tensor, kernel: Tensor, flip: bool = False) -> Tensor:
    """ECA's convolution of averages, (N, C, 1, 1) to the same, float32; `flip` reverses the kernel, (1, 1, k)."""
    out, block = torch.empty_like(y), min(512, triton.next_power_of_2(y.shape[1]))
    grid = (y.shape[0], triton.cdiv(y.shape[1], block))
    _launch(_convolve_kernel, grid, [y, kernel], [out], y.shape[1], kernel.shape[-1], flip, block)
    return out


def convolve_backward(grad: Tensor, y: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the averages, (N, C, 1, 1), and of the kernel, (1, 1, k), from the convolution's."""
    (n, c), k, block = y.shape[:2], kernel.shape[-1], min(512, triton.next_power_of_2(y.shape[1]))
    blocks = triton.cdiv(c, block)
    parts = y.new_empty(n * blocks, k)
    _launch(_correlate_kernel, (n, blocks), [grad, y], [parts], c, k, block)
    return convolve(grad, kernel, flip=True), parts.sum(0).view_as(kernel)
