"""An `eca_` twin for every timm model that ECA can be put in.

`eca_<name>` is timm's `<name>` with ECA after the last norm of each residual block, kernel sizes by the paper's formula
unless `kernel_sizes` says otherwise. Its pretrained tags are those of timm's model: they give warm starts, models that
compute what the plain ones do until they are fine-tuned.
"""
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs, is_model, list_models, register_model

from timm_eca.models.builder import base_cfgs, build_eca_model
from timm_eca.models.insert import FAMILIES, twin_name

__all__: list[str] = []  # register_model adds the entry points

# Networks with ECA already, and those whose blocks end in an activation or none in a norm.
_UNFIT = (
    'ecares*', 'lcnet_*', 'mobilenetv1_*', 'regnetv_*', 'mobileone_*', 'repvgg_*', 'legacy_seresnet18',
    'legacy_seresnet34', 'cs3darknet_*', 'cs3sedarknet_[lx]', 'cs3*edgenet_*', 'cspdarknet*', 'darknet*', 'sedarknet*',
    'xception*p', 'vit_tiny_r_*', 'vit_base_mci_*',
)
# How timm makes feature extractors of these families; of the others it wraps the whole model.
_FEATURES: dict[str, dict[str, Any]] = {
    'hrnet': {'features_in_base': True},
    'efficientnet': {'features_in_base': True},
    'mobilenetv3': {'features_in_base': True},
    'hardcorenas': {'features_in_base': True},
    'rexnet': {'feature_cfg': {'flatten_sequential': True}},
    'byobnet': {'feature_cfg': {'flatten_sequential': True}},
    'byoanet': {'feature_cfg': {'flatten_sequential': True}},
    'mobilevit': {'feature_cfg': {'flatten_sequential': True}},
    'cspnet': {'feature_cfg': {'flatten_sequential': True}},
    'repvit': {'feature_cfg': {'flatten_sequential': True, 'out_indices': (0, 1, 2, 3)}},
    'efficientvit_mit': {'feature_cfg': {'flatten_sequential': True, 'out_indices': (0, 1, 2, 3)}},
    'tresnet': {'feature_cfg': {'flatten_sequential': True, 'out_indices': (1, 2, 3, 4)}},
    'dla': {'feature_cfg': {'out_indices': (1, 2, 3, 4, 5)}},
    'xception': {'feature_cfg': {'feature_cls': 'hook'}},
    'xception_aligned': {'feature_cfg': {'flatten_sequential': True, 'feature_cls': 'hook'}},
    'mobilenetv5': {'feature_cfg': {'feature_cls': 'getter'}},
    'convmixer': {'feature_cfg': {'feature_cls': 'getter', 'out_indices': 3}},
    'vision_transformer_hybrid': {'feature_cfg': {'feature_cls': 'getter', 'out_indices': 3}},
}


def _make_entrypoint(variant: str, base: str, family: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model_args = {key: value.copy() if isinstance(value, dict) else value
                      for key, value in _FEATURES.get(family, {}).items()}
        if 'feature_cls' in kwargs or 'feature_cfg' in kwargs:  # as timm does, else it wraps a whole model
            model_args.pop('features_in_base', None)
        if pretrained and base == 'fbnetc_100':
            model_args['bn_eps'] = 1e-3  # timm's entry point does so for its weights
        return build_eca_model(variant, base, 'adaptive', pretrained, **{**model_args, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f'timm\'s {base} with ECA.'
    return entrypoint


_TWINS = {
    twin_name(base): (base, family)
    for family in FAMILIES
    for base in list_models(module=family, exclude_filters=_UNFIT)
    if not base.startswith('eca_') and not is_model(twin_name(base))
}
default_cfgs = generate_default_cfgs({
    name: cfg for variant, (base, _) in _TWINS.items() for name, cfg in base_cfgs(variant, base).items()
})
for _variant, (_base, _family) in _TWINS.items():
    globals()[_variant] = register_model(_make_entrypoint(_variant, _base, _family))
