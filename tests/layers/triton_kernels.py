"""The Triton kernels on a GPU, or on CPU tensors in Triton's interpreter, as `test_fused_triton.py` runs them.

    python -m pytest tests/layers/triton_kernels.py -n 0
    TRITON_INTERPRET=1 python -m pytest tests/layers/triton_kernels.py -n 0
"""
import copy
import os
from typing import Any

import pytest
import torch
import torch.nn as nn
from timm.models import create_model

from timm_eca import EfficientChannelAttention
from timm_eca.layers import fused, fused_triton
from timm_eca.layers.fused import fused_norm_eca, reference_norm_eca

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'  # read by triton when it is imported
FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 4e-4}  # the interpreter truncates to bfloat16
FORWARD = {  # in training or not
    True: ['_moments_kernel', '_statistics_kernel', '_forward_kernel'], False: ['_averages_kernel', '_forward_kernel']}
BACKWARD = ['_sums_kernel', '_gates_backward_kernel', '_backward_kernel']


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, on the device of the tests."""
    names: list[str] = []
    launch = fused_triton._launch

    def record(kernel: Any, *args: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args)
    monkeypatch.setattr(fused_triton, '_launch', record)
    monkeypatch.setattr(fused, 'backend_of', lambda device: fused_triton)
    return names


def make_modules(channels: int, kernel_size: int = 3) -> tuple[nn.BatchNorm2d, EfficientChannelAttention]:
    """A norm and an attention with tensors that are neither zero nor one."""
    torch.manual_seed(0)
    norm, attn = nn.BatchNorm2d(channels, momentum=0.3), EfficientChannelAttention(kernel_size)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(attn.conv.weight)
    return norm.to(DEVICE), attn.to(DEVICE)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def check(
        z: torch.Tensor, training: bool, launches: list[str], kernel_size: int = 3, factor: float = 1., **settings: Any,
) -> None:
    """Output, gradients (by autograd) and running statistics against float64."""
    norm, attn = make_modules(z.shape[1], kernel_size)
    vars(norm).update(settings)
    norm.train(training)
    exact = copy.deepcopy(norm).double()
    d = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    inputs = (z.requires_grad_(), norm.weight, norm.bias, attn.conv.weight)
    doubles = tuple(t.detach().double().requires_grad_() for t in inputs)
    frozen = (None, None) if training else (exact.running_mean, exact.running_var)
    wanted = reference_norm_eca(*doubles, *frozen, norm.eps)
    wanted_gradients = torch.autograd.grad(wanted, doubles, d.double())

    with torch.autocast(DEVICE, z.dtype, enabled=z.dtype != torch.float32):
        out = fused_norm_eca(z, norm, attn)
    assert out is not None
    assert out.dtype == z.dtype
    assert out.stride() == z.stride()
    assert launches == FORWARD[training]
    gradients = torch.autograd.grad(out, inputs, d)
    assert launches == FORWARD[training] + BACKWARD
    memory_format = torch.contiguous_format if z.is_contiguous() else torch.channels_last
    assert gradients[0].is_contiguous(memory_format=memory_format)
    assert distance(out, wanted) < factor * TOLERANCE[z.dtype]
    for found, right in zip(gradients, wanted_gradients):
        assert distance(found, right) < factor * TOLERANCE[z.dtype]
    if training:
        exact(z.double())
    for found, right in zip(norm.buffers(), exact.buffers()):
        torch.testing.assert_close(found.double(), right.double(), rtol=2e-6 * factor, atol=2e-6)


@FORMATS
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(('shape', 'dtype'), [
    *(((2, 40, 7, 7), dtype) for dtype in TOLERANCE), ((6, 16, 1, 1), torch.float32), ((1, 24, 9, 11), torch.bfloat16),
    ((3, 70, 2, 5), torch.float16)])
def test_shapes_types_and_formats(
        shape: tuple[int, ...], dtype: torch.dtype, training: bool, memory_format: torch.memory_format, launches: Any):
    check(torch.randn(shape).to(DEVICE, dtype).to(memory_format=memory_format), training, launches)


@FORMATS
@pytest.mark.parametrize(('shape', 'kernel_size'), [((2, 16, 56, 56), 1), ((2, 1024, 2, 2), 7), ((1, 2048, 7, 7), 5)])
def test_large_shapes(shape: tuple[int, ...], kernel_size: int, memory_format: torch.memory_format, launches: Any):
    check(torch.randn(shape).to(DEVICE, torch.bfloat16).to(memory_format=memory_format), True, launches, kernel_size)


@FORMATS
@pytest.mark.parametrize(('offset', 'dtype', 'factor'), [
    (50., torch.bfloat16, 1.), (300., torch.float16, 1.), (1000., torch.float32, 100.)])
def test_far_from_zero(
        offset: float, dtype: torch.dtype, factor: float, memory_format: torch.memory_format, launches: Any):
    """A naive sum of squares loses all digits here. At 1000 float32 has three digits less for the mean itself."""
    z = (torch.randn(3, 20, 12, 12) + offset).to(DEVICE, dtype)
    check(z.to(memory_format=memory_format), True, launches, factor=factor)


@FORMATS
@pytest.mark.parametrize(('settings', 'training'), [({'eps': 0.}, False), ({'momentum': 1.}, True)], ids=str)
def test_settings_of_the_norm(
        settings: dict[str, float], training: bool, memory_format: torch.memory_format, launches: Any):
    check(torch.randn(3, 12, 4, 4, device=DEVICE).to(memory_format=memory_format), training, launches, **settings)


@FORMATS
def test_inference(memory_format: torch.memory_format, launches: Any):
    """Without gradients: the same output, by the same kernels."""
    norm, attn = make_modules(24)
    norm.eval()
    z = torch.randn(2, 24, 5, 5).to(DEVICE, memory_format=memory_format)
    with torch.no_grad():
        found = fused_norm_eca(z, norm, attn)
    assert launches == FORWARD[False]
    assert found is not None
    wanted = fused_norm_eca(z, norm, attn)
    assert wanted is not None
    assert torch.equal(found, wanted)


@pytest.mark.parametrize('z', [
    torch.randn(2, 4, 9, 9, device=DEVICE)[:, :, ::2, ::2], torch.randn(2, 4, 1, 6, device=DEVICE).expand(2, 4, 5, 6),
    torch.randn(4, 3, 5, 5, device=DEVICE).transpose(0, 1),
], ids=lambda z: f'{tuple(z.shape)}-{z.stride()}')
def test_other_strides(z: torch.Tensor):
    norm, attn = make_modules(z.shape[1])
    z.requires_grad_()
    out = fused_norm_eca(z, norm, attn)
    assert out is not None
    inputs = (z, norm.weight, norm.bias, attn.conv.weight)
    gradients = torch.autograd.grad(out, inputs, torch.ones((), device=DEVICE).expand_as(out))
    wanted = attn(nn.functional.batch_norm(z, None, None, norm.weight, norm.bias, True, 0., norm.eps))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.sum(), inputs), rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients():
    norm, attn = make_modules(6)
    z = torch.randn(2, 6, 3, 3, device=DEVICE, requires_grad=True)

    def penalty(forward: Any) -> tuple[torch.Tensor, ...]:
        gradient, = torch.autograd.grad(forward(z).square().sum(), z, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (z, norm.weight, attn.conv.weight))
    found = penalty(lambda z: fused_norm_eca(z, norm, attn))
    torch.testing.assert_close(found, penalty(lambda z: attn(norm(z))), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('autocast', 'memory_format'), [(False, torch.contiguous_format), (True, torch.channels_last)])
def test_whole_model(
        autocast: bool, memory_format: torch.memory_format, launches: Any, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = create_model('eca_test_resnet', num_classes=3).to(DEVICE, memory_format=memory_format).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # in new models the last norms of blocks are zero
    x = torch.randn(6, 3, 32, 32, device=DEVICE)

    def step(on: bool, exact: bool) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(fused, 'backend_of', lambda device: fused_triton if on else None)
        m = copy.deepcopy(model).double() if exact else copy.deepcopy(model)
        with torch.autocast(DEVICE, torch.float16, enabled=autocast and not exact):
            logits = m(x.to(next(m.parameters()).dtype, memory_format=memory_format))
        logits.float().square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        return logits, gradients, torch.cat([buffer.flatten().double() for buffer in m.buffers()])
    found, by_modules, wanted = step(True, False), step(False, False), step(False, True)
    assert launches == FORWARD[True] * 4 + BACKWARD * 4
    for ours, theirs, exact in zip(found, by_modules, wanted):
        assert distance(ours, exact) <= 2 * distance(theirs, exact)  # 1.7 in float16 on a GPU, in a network so small
