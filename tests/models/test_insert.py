"""ECA's kernel sizes."""
import pytest
import torch

from timm_eca.models.insert import resolve_kernel_sizes
from timm_eca.weights.key_maps import describe_kernel_sizes

BLOCKS = (['layer1', 'layer2', 'layer2', 'layer3', 'layer4'], [64, 128, 128, 512, 2048])  # stages and channels


@pytest.mark.parametrize(('kernel_sizes', 'resolved'), [
    ((3, 5, 5, 7), [3, 5, 5, 5, 7]), ([1, 1, 3, 9], [1, 1, 1, 3, 9]), (3, [3] * 5), ('adaptive', [3, 5, 5, 5, 7])])
def test_kernel_sizes(kernel_sizes, resolved: list[int]):
    assert resolve_kernel_sizes(kernel_sizes, *BLOCKS) == resolved


@pytest.mark.parametrize('kernel_sizes', [
    2, 0, -3, 3.0, True, None, '3', 'adaptiv', (3, 3, 3), (3,) * 5, (), (3, 3, 3, 4), (3, 3, 3, 3.5), (3, 3, 3, None),
    ((3, 3, 3, 3),), {3, 5, 7, 9}, b'3333',
])
def test_wrong_kernel_sizes(kernel_sizes):
    accepted = "kernel_sizes must be 'adaptive', one odd, positive integer, or a sequence of 4 such integers"
    with pytest.raises(ValueError, match=accepted):
        resolve_kernel_sizes(kernel_sizes, *BLOCKS)


def test_kernel_sizes_of_a_state_dict():
    def kernels(**sizes: int) -> dict[str, torch.Tensor]:
        return {f'layer{name[1]}.{name[3]}.bn2.attn.conv.weight': torch.zeros(1, 1, k) for name, k in sizes.items()}
    assert describe_kernel_sizes(kernels(s1b0=3, s1b1=3, s2b0=5)) == '3, 5'
    assert describe_kernel_sizes(kernels(s1b0=7, s1b1=5, s2b0=5)) == '5/7, 5'
    assert describe_kernel_sizes({}) == ''
