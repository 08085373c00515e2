"""ECA-Net: residual networks with ECA.

The networks are timm's ResNets, with ECA after the last norm of every block. As in torchvision, the stride is on the
3x3 convolution.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from typing import Any

from timm.models import ResNet, generate_default_cfgs, register_model

from timm_eca.models.builder import build_eca_model, eca_cfgs

__all__: list[str] = []  # register_model adds the entry points


default_cfgs = generate_default_cfgs({
    **eca_cfgs('eca_resnet18', 'resnet18'),
    **eca_cfgs('eca_resnet34', 'resnet34'),
    **eca_cfgs('eca_resnet50', 'resnet50'),
    **eca_cfgs('eca_resnet101', 'resnet101'),
    **eca_cfgs('eca_resnet152', 'resnet152'),
    **eca_cfgs('eca_resnext50_32x4d', 'resnext50_32x4d'),
    **eca_cfgs('eca_wide_resnet50_2', 'wide_resnet50_2'),
})


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net18: ResNet-18 with ECA, kernel sizes 3, 5, 7, 7."""
    return build_eca_model('eca_resnet18', 'resnet18', pretrained, **kwargs)


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net34: ResNet-34 with ECA, kernel sizes 3, 3, 5, 7."""
    return build_eca_model('eca_resnet34', 'resnet34', pretrained, **kwargs)


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net50: ResNet-50 with ECA, kernel sizes 3, 5, 5, 7."""
    return build_eca_model('eca_resnet50', 'resnet50', pretrained, **kwargs)


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net101: ResNet-101 with ECA, kernel sizes 3, 3, 5, 7."""
    return build_eca_model('eca_resnet101', 'resnet101', pretrained, **kwargs)


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ECA-Net152: ResNet-152 with ECA, kernel sizes 3, 3, 5, 7."""
    return build_eca_model('eca_resnet152', 'resnet152', pretrained, **kwargs)


@register_model
def eca_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return build_eca_model('eca_resnext50_32x4d', 'resnext50_32x4d', pretrained, **kwargs)


@register_model
def eca_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return build_eca_model('eca_wide_resnet50_2', 'wide_resnet50_2', pretrained, **kwargs)
