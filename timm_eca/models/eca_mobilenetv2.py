"""ECA-MobileNetV2: MobileNetV2 with ECA.

The networks are timm's MobileNetV2, with ECA after the last norm of every inverted residual block, on its output
channels. The first block, which does not expand, has ECA too.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from typing import Any

from timm.models import EfficientNet, generate_default_cfgs, register_model

from timm_eca.models.builder import build_eca_model, eca_cfgs

__all__: list[str] = []  # register_model adds the entry points


default_cfgs = generate_default_cfgs({
    **eca_cfgs('eca_mobilenetv2', 'mobilenetv2_100'),
    **eca_cfgs('eca_mobilenetv2_050', 'mobilenetv2_050'),
    **eca_cfgs('eca_mobilenetv2_140', 'mobilenetv2_140'),
})


@register_model
def eca_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """ECA-MobileNetV2: MobileNetV2 with ECA, kernel size 1 below 96 channels and 3 from there on."""
    # NOTE the authors trained with a dropout of 0.25 before the classifier, i.e. drop_rate=0.25
    return build_eca_model('eca_mobilenetv2', 'mobilenetv2_100', pretrained, **kwargs)


@register_model
def eca_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 of half the width with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return build_eca_model('eca_mobilenetv2_050', 'mobilenetv2_050', pretrained, **kwargs)


@register_model
def eca_mobilenetv2_140(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 1.4 times as wide with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return build_eca_model('eca_mobilenetv2_140', 'mobilenetv2_140', pretrained, **kwargs)
