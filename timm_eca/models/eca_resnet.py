"""ECA-Net: residual networks with ECA.

The networks are timm's ResNets, which have torchvision's plan (the stride is on the 3x3 convolution), with ECA after
the last norm of every block.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ResNet, generate_default_cfgs, register_model

from timm_eca.models.builder import base_cfgs, build_eca_model
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.weights.store import hub_id

__all__: list[str] = []  # register_model adds the entry points


def _create_eca_resnet(variant: str, base: str, pretrained: bool = False, **kwargs: Any) -> ResNet:
    kernel_sizes = OFFICIAL[variant].kernel_sizes if variant in OFFICIAL else 'adaptive'
    return build_eca_model(variant, base, kernel_sizes, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'mit', 'origin_url': REPOSITORY, 'paper_name': PAPER_NAME, 'paper_ids': PAPER_ID,
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    f'eca_resnet18.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_resnet18.{TAG}')),
    **base_cfgs('eca_resnet18', 'resnet18'),
    f'eca_resnet34.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_resnet34.{TAG}')),
    **base_cfgs('eca_resnet34', 'resnet34'),
    f'eca_resnet50.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_resnet50.{TAG}')),
    **base_cfgs('eca_resnet50', 'resnet50'),
    f'eca_resnet101.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_resnet101.{TAG}')),
    **base_cfgs('eca_resnet101', 'resnet101'),
    f'eca_resnet152.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_resnet152.{TAG}')),
    **base_cfgs('eca_resnet152', 'resnet152'),
    **base_cfgs('eca_resnext50_32x4d', 'resnext50_32x4d'),
    **base_cfgs('eca_wide_resnet50_2', 'wide_resnet50_2'),
})


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net18: ResNet-18 with ECA, kernel sizes 3, 5, 7, 7."""
    return _create_eca_resnet('eca_resnet18', 'resnet18', pretrained, **kwargs)


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net34: ResNet-34 with ECA, kernel sizes 3, 3, 5, 7."""
    return _create_eca_resnet('eca_resnet34', 'resnet34', pretrained, **kwargs)


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net50: ResNet-50 with ECA, kernel sizes 3, 5, 5, 7."""
    return _create_eca_resnet('eca_resnet50', 'resnet50', pretrained, **kwargs)


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net101: ResNet-101 with ECA, kernel sizes 3, 3, 5, 7."""
    return _create_eca_resnet('eca_resnet101', 'resnet101', pretrained, **kwargs)


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net152: ResNet-152 with ECA, kernel sizes 3, 3, 5, 7."""
    return _create_eca_resnet('eca_resnet152', 'resnet152', pretrained, **kwargs)


@register_model
def eca_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return _create_eca_resnet('eca_resnext50_32x4d', 'resnext50_32x4d', pretrained, **kwargs)


@register_model
def eca_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return _create_eca_resnet('eca_wide_resnet50_2', 'wide_resnet50_2', pretrained, **kwargs)
