"""Batch norm and ECA as one operation on GPUs, by kernels in Triton (`timm_eca.layers.fused` has the mathematics).

A GPU computes far faster than it reads and writes the (N, C, H, W) maps, so the passes over maps count:

    forward, training     `_moments_kernel` reads z; `_forward_kernel` reads z and writes the output
    forward, else         the same, but `_averages_kernel` takes the place of `_moments_kernel`
    backward              `_sums_kernel` reads the gradient and z; `_backward_kernel` reads both and writes dz

`_statistics_kernel` and `_gates_backward_kernel` stand between the two. All other tensors have one value for each
channel of an image, or of a chunk of it. A launch costs the processor as much time as several calls of torch, so the
second pass computes the gates itself.

Accuracy. Maps may be float32, bfloat16 or float16; all sums are float32. Variances come from Welford's recurrence, and
all other sums and products use the distance of z from the mean, so no digits cancel if z is far from zero.

Determinism. No atomics. Each program reduces one chunk of an image, for a block of channels, and the chunks are
added up in a fixed order. The chunks of a shape are of equal size and do not depend on the device.
"""
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['DTYPES', 'backward', 'forward', 'infer']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of maps

_PROGRAMS = 1024  # the least number wanted, for GPUs of up to some 150 multiprocessors


@triton.jit
def _place(channels, length, chunks, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """The program's row of results, its image, its channels, and where their chunks begin in a map."""
    blocks = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // blocks
    image = row // chunks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # In 64 bits, as all places in maps: a batch, or an image, may have more than 2^31 values.
    first = (row % chunks * length).to(tl.int64)
    offsets = image.to(tl.int64) * channels * length * chunks + first * stride_p + c.to(tl.int64) * stride_c
    return row, image, c, offsets[:, None]


@triton.jit
def _load(vector, c, channels):
    return tl.load(vector + c, (c >= 0) & (c < channels), other=0.).to(tl.float32)


@triton.jit
def _invstd(var, c, channels, eps):
    """One over the standard deviation. Beyond the channels it is finite, so that zero times it is zero."""
    return tl.rsqrt(tl.load(var + c, (c >= 0) & (c < channels), other=1.).to(tl.float32) + eps)


@triton.jit
def _normalized(averages, mean, var, image, c, channels, eps):
    """The average of n over the map, of these channels of an image."""
    average = _load(averages + image * channels, c, channels)
    return (average - _load(mean, c, channels)) * _invstd(var, c, channels, eps)


@triton.jit
def _y(averages, mean, var, weight, bias, image, c, channels, eps):
    """The average of x over the map. It is zero beyond the first and the last channel."""
    n = _normalized(averages, mean, var, image, c, channels, eps)
    return n * _load(weight, c, channels) + _load(bias, c, channels)


@triton.jit
def _averages_kernel(
        z, averages, channels, length, chunks, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    row, _, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        total += tl.load(z + offsets + (start + p)[None, :].to(tl.int64) * stride_p, mask, other=0.).to(tl.float32)
    tl.store(averages + row * channels + c, tl.sum(total, 1) / length, c < channels)


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
        x = tl.load(z + offsets + (start + p)[None, :].to(tl.int64) * stride_p, mask, other=0.).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(mask, x - mean, 0.)
        mean += delta * (1. / tl.maximum(count, 1.))[None, :]
        m2 += delta * (x - mean)
    chunk_mean = tl.sum(mean * count[None, :], 1) / length
    off = mean - chunk_mean[:, None]
    chunk_m2 = tl.sum(m2 + off * off * count[None, :], 1)
    tl.store(means + row * channels + c, chunk_mean, c < channels)
    tl.store(m2s + row * channels + c, chunk_m2, c < channels)


@triton.jit
def _statistics_kernel(
        means, m2s, mean, var, running_mean, running_var, rows, channels, length, count, momentum,
        BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Batch statistics from those of all chunks, and the running statistics."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        mask = (start + r < rows) & (c < channels)[None, :]
        total += tl.load(means + (start + r) * channels + c[None, :], mask, other=0.)
    center = tl.sum(total, 0) / rows
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        mask = (start + r < rows) & (c < channels)[None, :]
        at = (start + r) * channels + c[None, :]
        off = tl.load(means + at, mask, other=0.) - center[None, :]
        total += tl.where(mask, tl.load(m2s + at, mask, other=0.) + off * off * length, 0.)
    m2, inside = tl.sum(total, 0), c < channels
    tl.store(mean + c, center, inside)
    tl.store(var + c, m2 / count, inside)
    old_mean, old_var = _load(running_mean, c, channels), _load(running_var, c, channels)
    tl.store(running_mean + c, (1 - momentum) * old_mean + momentum * center, inside)
    tl.store(running_var + c, (1 - momentum) * old_var + momentum * (m2 / (count - 1)), inside)


@triton.jit
def _forward_kernel(
        z, averages, mean, var, weight, bias, kernel, out, gates, channels, length, chunks, stride_c, stride_p, eps,
        K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    _, image, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    logits = tl.zeros([BLOCK_C], tl.float32)
    for i in range(K):
        y = _y(averages, mean, var, weight, bias, image, c + i - K // 2, channels, eps)
        logits += y * tl.load(kernel + i).to(tl.float32)
    gate = tl.sigmoid(logits)
    if gates is not None:
        tl.store(gates + image * channels + c, gate, c < channels)  # all chunks of an image store the same
    center = _load(mean, c, channels)[:, None]
    scale = (gate * (_load(weight, c, channels) * _invstd(var, c, channels, eps)))[:, None]
    shift = (gate * _load(bias, c, channels))[:, None]
    p = tl.arange(0, BLOCK_P)
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        at = offsets + (start + p)[None, :].to(tl.int64) * stride_p
        x = tl.load(z + at, mask, other=0.).to(tl.float32)
        tl.store(out + at, ((x - center) * scale + shift).to(out.dtype.element_ty), mask)


@triton.jit
def _sums_kernel(
        d, z, mean, sums_dz, sums_d, channels, length, chunks, stride_c, stride_p,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    row, _, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    center = _load(mean, c, channels)[:, None]
    sum_dz = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_d = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        at = offsets + (start + p)[None, :].to(tl.int64) * stride_p
        grad = tl.load(d + at, mask, other=0.).to(tl.float32)
        x = tl.load(z + at, mask, other=0.).to(tl.float32)
        sum_dz += grad * (x - center)  # beyond the mask the gradient is zero
        sum_d += grad
    tl.store(sums_dz + row * channels + c, tl.sum(sum_dz, 1), c < channels)
    tl.store(sums_d + row * channels + c, tl.sum(sum_d, 1), c < channels)


@triton.jit
def _dlogits(sums_dz, sums_d, gates, var, weight, bias, image, c, channels, eps):
    """The gradient of the convolution's output, and the sum of d * n over the map, of these channels of an image."""
    sum_dn = _load(sums_dz + image * channels, c, channels) * _invstd(var, c, channels, eps)
    gate = _load(gates + image * channels, c, channels)
    dgate = _load(weight, c, channels) * sum_dn + _load(bias, c, channels) * _load(
        sums_d + image * channels, c, channels)
    return dgate * gate * (1. - gate), sum_dn


@triton.jit
def _gates_backward_kernel(
        sums_dz, sums_d, averages, gates, mean, var, weight, bias, kernel, dys, of_norm, dkernels,
        channels, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    image, block = tl.program_id(0), tl.program_id(1)
    c = block * BLOCK + tl.arange(0, BLOCK)
    dlogits, sum_dn = _dlogits(sums_dz, sums_d, gates, var, weight, bias, image, c, channels, eps)
    dy = tl.zeros([BLOCK], tl.float32)
    for i in range(K):
        # One value reaches its neighbours on both sides.
        from_right, _ = _dlogits(
            sums_dz, sums_d, gates, var, weight, bias, image, c + K // 2 - i, channels, eps)
        dy += from_right * tl.load(kernel + i).to(tl.float32)
        y = _y(averages, mean, var, weight, bias, image, c + i - K // 2, channels, eps)
        tl.store(dkernels + (image * tl.num_programs(1) + block) * K + i, tl.sum(dlogits * y, 0))
    at, inside = image * channels + c, c < channels
    gate, sum_d = _load(gates + image * channels, c, channels), _load(sums_d + image * channels, c, channels)
    n = _normalized(averages, mean, var, image, c, channels, eps)
    tl.store(dys + at, dy, inside)
    # What this image adds to the gradients of weight and bias.
    tl.store(of_norm + at, gate * sum_dn + dy * n, inside)
    tl.store(of_norm + tl.num_programs(0) * channels + at, gate * sum_d + dy, inside)


@triton.jit
def _backward_kernel(
        d, z, gates, dys, dweight, dbias, mean, var, weight, dz, channels, length, chunks, stride_c, stride_p,
        eps, count, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    _, image, c, offsets = _place(channels, length, chunks, stride_c, stride_p, BLOCK_C)
    invstd = _invstd(var, c, channels, eps)
    slope = _load(weight, c, channels) * invstd
    on_d = (slope * _load(gates + image * channels, c, channels))[:, None]
    dx = _load(dys + image * channels, c, channels) / (length * chunks)
    if z is not None:  # the statistics are those of the batch
        dx -= _load(dbias, c, channels) / count
        on_z = (-slope * invstd * _load(dweight, c, channels) / count)[:, None]
        center = _load(mean, c, channels)[:, None]
    constant = (slope * dx)[:, None]
    p = tl.arange(0, BLOCK_P)
    for start in range(0, length, BLOCK_P):
        mask = (c < channels)[:, None] & (start + p < length)[None, :]
        at = offsets + (start + p)[None, :].to(tl.int64) * stride_p
        value = tl.load(d + at, mask, other=0.).to(tl.float32) * on_d + constant
        if z is not None:
            value += (tl.load(z + at, mask, other=0.).to(tl.float32) - center) * on_z
        tl.store(dz + at, value.to(dz.dtype.element_ty), mask)


@cache
def _layout(n: int, c: int, positions: int, channels_last: bool, tile: int) -> tuple[int, int, int]:
    """Chunks of a map, and channels and positions of a tile, which is longest in the contiguous direction."""
    if channels_last:
        block_c = min(128, triton.next_power_of_2(c))
        block_p = min(tile // block_c, triton.next_power_of_2(positions))
    else:
        block_p = min(1024, triton.next_power_of_2(positions))
        block_c = min(tile // block_p, triton.next_power_of_2(c))
    wanted = min(triton.cdiv(_PROGRAMS, n * triton.cdiv(c, block_c)), positions // block_p)
    aligned = math.gcd(positions, 16)
    chunks = max((i for i in range(1, wanted + 1) if positions % (i * aligned) == 0), default=1)
    return chunks, block_c, block_p


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    """Runs a kernel on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args)


def _pass(
        kernel: Any, like: Tensor, tensors: Sequence[Tensor | None], *args: Any, results: int = 0, tile: int = 4096,
) -> Sequence[Tensor]:
    """Runs a kernel that passes over maps with the strides of `like`.

    Returns so many results of each chunk of each channel, each (N, chunks, C).
    """
    n, c, h, w = like.shape
    strides = (h * w, 1) if like.is_contiguous() else (1, c)
    chunks, block_c, block_p = _layout(n, c, h * w, strides[0] == 1, tile)
    reduced = like.new_empty(results, n, chunks, c, dtype=torch.float32).unbind() if results else ()
    grid = (n * chunks * triton.cdiv(c, block_c),)
    _launch(kernel, grid, *tensors, *reduced, c, h * w // chunks, chunks, *strides, *args, block_c, block_p)
    return reduced


def _mean(chunks: Tensor) -> Tensor:
    """The mean over equal chunks, (N, chunks, C) to (N, C)."""
    return chunks.mean(1) if chunks.shape[1] > 1 else chunks[:, 0]


def _dense(z: Tensor) -> Tensor:
    return z.contiguous(memory_format=torch.contiguous_format if z.is_contiguous() else torch.channels_last)


def infer(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
) -> Tensor:
    """The output in inference."""
    z = _dense(z)
    averages = _mean(*_pass(_averages_kernel, z, [z], results=1))
    out = torch.empty_like(z)
    _pass(_forward_kernel, z, [z, averages, running_mean, running_var, weight, bias, kernel, out, None], eps,
          kernel.shape[-1])
    return out


def forward(
        z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, running_mean: Tensor, running_var: Tensor,
        training: bool, momentum: float, eps: float,
) -> tuple[Tensor, ...]:
    """The output, and for backward: mean, var, averages of z and gates."""
    z = _dense(z)
    if training:
        means, m2s = _pass(_moments_kernel, z, [z], results=2, tile=2048)
        averages = _mean(means)
        c, rows, m = z.shape[1], means.shape[0] * means.shape[1], z.numel() // z.shape[1]
        mean, var = means.new_empty(2, c)
        _launch(
            _statistics_kernel, (triton.cdiv(c, 32),), means, m2s, mean, var, running_mean, running_var, rows, c,
            m // rows, float(m), momentum, 32, 64)
    else:
        averages, mean, var = _mean(*_pass(_averages_kernel, z, [z], results=1)), running_mean, running_var
    out, gates = torch.empty_like(z), torch.empty_like(averages)
    _pass(_forward_kernel, z, [z, averages, mean, var, weight, bias, kernel, out, gates], eps, kernel.shape[-1])
    return out, mean, var, averages, gates


def backward(
        d: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, kept: Sequence[Tensor], training: bool,
        eps: float, needs_dz: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of z (or None), weight, bias and kernel."""
    mean, var, averages, gates = kept
    z = _dense(z)
    d = d.contiguous(memory_format=torch.contiguous_format if z.is_contiguous() else torch.channels_last)
    n, c, k = z.shape[0], z.shape[1], kernel.shape[-1]
    sums_dz, sums_d = (
        sums.sum(1) if sums.shape[1] > 1 else sums for sums in _pass(_sums_kernel, z, [d, z, mean], results=2))
    dys, of_norm = torch.empty_like(gates), gates.new_empty(2, n, c)
    block = min(512, triton.next_power_of_2(c))
    blocks = triton.cdiv(c, block)
    dkernels = gates.new_empty(n * blocks, k)
    _launch(
        _gates_backward_kernel, (n, blocks), sums_dz, sums_d, averages, gates, mean, var, weight, bias, kernel, dys,
        of_norm, dkernels, c, eps, k, block)
    dweight, dbias = of_norm.sum(1)
    dz = torch.empty_like(z) if needs_dz else None
    if dz is not None:
        _pass(_backward_kernel, d, [d, z if training else None, gates, dys, dweight, dbias, mean, var, weight, dz],
              eps, float(z.numel() // c))
    return dz, dweight, dbias, dkernels.sum(0).view_as(kernel)
