"""ECA-MobileNetV2: MobileNetV2 with ECA.

The networks are timm's MobileNetV2, with ECA after the last norm of every inverted residual block, on its output
channels, in the first block (which does not expand) too.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import EfficientNet, generate_default_cfgs, register_model

from timm_eca.models.builder import base_cfgs, build_eca_model
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.weights.store import hub_id

__all__: list[str] = []  # register_model adds the entry points


def _create_eca_mobilenetv2(variant: str, base: str, pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    kernel_sizes = OFFICIAL[variant].kernel_sizes if variant in OFFICIAL else 'adaptive'
    features_in_base = not kwargs.keys() & {'feature_cls', 'feature_cfg'}  # as timm does, else it wraps a whole model
    return build_eca_model(variant, base, kernel_sizes, pretrained, features_in_base=features_in_base, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem', 'classifier': 'classifier',
        'license': 'mit', 'origin_url': REPOSITORY, 'paper_name': PAPER_NAME, 'paper_ids': PAPER_ID,
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    f'eca_mobilenetv2.{TAG}': _cfg(hf_hub_id=hub_id(f'eca_mobilenetv2.{TAG}')),
    **base_cfgs('eca_mobilenetv2', 'mobilenetv2_100'),
    **base_cfgs('eca_mobilenetv2_050', 'mobilenetv2_050'),
    **base_cfgs('eca_mobilenetv2_140', 'mobilenetv2_140'),
})


@register_model
def eca_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """ECA-MobileNetV2: MobileNetV2 with ECA, kernel size 1 below 96 channels and 3 from there on."""
    # NOTE the authors trained with a dropout of 0.25 before the classifier, i.e. drop_rate=0.25
    return _create_eca_mobilenetv2('eca_mobilenetv2', 'mobilenetv2_100', pretrained, **kwargs)


@register_model
def eca_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 of half the width with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return _create_eca_mobilenetv2('eca_mobilenetv2_050', 'mobilenetv2_050', pretrained, **kwargs)


@register_model
def eca_mobilenetv2_140(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 1.4 times as wide with ECA, kernel sizes by the paper's formula, warm starts from timm's weights."""
    return _create_eca_mobilenetv2('eca_mobilenetv2_140', 'mobilenetv2_140', pretrained, **kwargs)
