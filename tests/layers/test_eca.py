"""The layer against the paper's equations."""
import pytest
import torch

from timm_eca import EfficientChannelAttention, adaptive_kernel_size


def reference_eca(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """ECA from the paper's equations, one channel at a time: x is (N, C, H, W), weight has k values."""
    n, c, h, w = x.shape
    k = len(weight)
    y = x.sum((2, 3)) / (h * w)  # eq. 1: global average pooling
    out = torch.empty_like(x)
    for i in range(c):
        neighbours = [(j, i + j - k // 2) for j in range(k)]  # eq. 5: the k adjacent channels of channel i
        total = sum(weight[j] * y[:, channel] for j, channel in neighbours if 0 <= channel < c)
        out[:, i] = x[:, i] / (1 + torch.exp(-total)).view(n, 1, 1)
    return out


@pytest.mark.parametrize('kernel_size', [1, 3, 5, 7, 9])
@pytest.mark.parametrize('shape', [(2, 16, 5, 7), (1, 3, 1, 1), (3, 2, 4, 4)])
def test_layer_computes_the_equations(kernel_size: int, shape: tuple[int, ...]):
    layer = EfficientChannelAttention(kernel_size).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference_eca(x, layer.conv.weight.flatten()), rtol=1e-12, atol=1e-12)


def test_only_parameter_is_the_kernel():
    layer = EfficientChannelAttention(5)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {'conv.weight': (1, 1, 5)}


def test_gradients():
    layer = EfficientChannelAttention(3).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(layer, {'conv.weight': w}, x),
                                    (x, layer.conv.weight))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype: torch.dtype):
    layer = EfficientChannelAttention(3, dtype=dtype)
    x = torch.randn(2, 8, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    out = layer(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x.contiguous()))


def test_zero_kernel_halves_exactly():
    layer = EfficientChannelAttention(3)
    torch.nn.init.zeros_(layer.conv.weight)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(layer(x), x / 2)


def test_empty_batch():
    assert EfficientChannelAttention(3)(torch.randn(0, 8, 6, 6)).shape == (0, 8, 6, 6)


def test_adaptive_kernel_size():
    """Eq. 12, for the channels of the networks and around the steps, worked out by hand."""
    sizes = {1: 1, 4: 1, 8: 3, 16: 3, 64: 3, 127: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2047: 5, 2048: 7, 4096: 7}
    assert {channels: adaptive_kernel_size(channels) for channels in sizes} == sizes


@pytest.mark.parametrize('kernel_size', [0, -3, 2, 3.0, '3', None, True])
def test_wrong_kernel_sizes_are_refused(kernel_size):
    with pytest.raises(ValueError, match='odd, positive integer'):
        EfficientChannelAttention(kernel_size)
