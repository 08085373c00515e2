"""ECA's kernel sizes and its place in a model."""
import pytest
import timm
import torch

from timm_eca import EfficientChannelAttention
from timm_eca.models.insert import insert_attn, resolve_kernel_sizes
from timm_eca.weights.key_maps import kernel_sizes_by_stage


@pytest.mark.parametrize(('kernel_sizes', 'resolved'), [
    ((3, 5, 5, 7), (3, 5, 5, 7)),
    ([1, 1, 3, 9], (1, 1, 3, 9)),
    (3, (3, 3, 3, 3)),
    ('adaptive', (3, 5, 5, 7)),
])
def test_kernel_sizes(kernel_sizes, resolved: tuple[int, ...]):
    assert resolve_kernel_sizes(kernel_sizes, [[64], [128, 128], [512], [2048]]) == [
        [resolved[0]], [resolved[1]] * 2, [resolved[2]], [resolved[3]]]


@pytest.mark.parametrize('kernel_sizes', [
    2, 0, -3, 3.0, True, None, '3', 'adaptiv', (3, 3, 3), (3,) * 5, (), (3, 3, 3, 4), (3, 3, 3, 3.5), (3, 3, 3, None),
    ((3, 3, 3, 3),), {3, 5, 7, 9}, b'3333',
])
def test_wrong_kernel_sizes(kernel_sizes):
    accepted = "kernel_sizes must be 'adaptive', one odd, positive integer, or a sequence of 4 such integers"
    with pytest.raises(ValueError, match=accepted):
        resolve_kernel_sizes(kernel_sizes, [[64], [128], [256], [512]])


def test_place_and_bookkeeping():
    """The model keeps its weights, its mode, device and dtype; ECA stands next to the last norm of every block."""
    model = timm.create_model('resnet50', dtype=torch.bfloat16).eval()
    before = dict(model.named_parameters())
    assert insert_attn(model, 'eca', (3, 5, 7, 9)) is model
    after = dict(model.named_parameters())
    kept = {name.replace('.norm.', '.'): p for name, p in after.items() if '.attn.' not in name}
    assert kept.keys() == before.keys()
    assert all(kept[name] is p for name, p in before.items())
    added = {name for name in after if '.attn.' in name}
    assert added == {
        f'layer{stage}.{i}.bn3.attn.conv.weight' for stage, depth in enumerate((3, 4, 6, 3), 1) for i in range(depth)}
    assert {after[name].dtype for name in added} == {torch.bfloat16}
    assert kernel_sizes_by_stage(after) == {'layer1': (3,), 'layer2': (5,), 'layer3': (7,), 'layer4': (9,)}
    assert not any(module.training for module in model.modules())
    plain = timm.create_model('resnet50', device='meta')
    assert [n for n, _ in model.layer2[0].named_children()] == [n for n, _ in plain.layer2[0].named_children()]
    assert not any(isinstance(m, EfficientChannelAttention) for m in model.layer2[0].downsample.modules())


def test_model_without_a_place():
    with pytest.raises(ValueError, match=r'VisionTransformer has no residual block.*resnet, hrnet'):
        insert_attn(timm.create_model('vit_tiny_patch16_224', device='meta'), 'eca', 3)
