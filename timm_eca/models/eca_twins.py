"""An `eca_` twin for every timm model that has a place for ECA.

`eca_<name>` is timm's `<name>` with ECA after the last norm of each residual block. The kernel sizes follow the paper's
formula by default (`kernel_sizes`). The pretrained tags are those of timm's model. They give warm starts: models that
compute the same as the plain ones until they are fine-tuned.
"""
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs, is_model, list_models, register_model

from timm_eca.models.builder import build_eca_model, eca_cfgs
from timm_eca.models.insert import FAMILIES, twin_name

__all__: list[str] = []  # register_model adds the entry points

# Networks that have ECA already, and those with no block that ends in a norm without an activation.
_UNFIT = (
    'ecares*', 'lcnet_*', 'mobilenetv1_*', 'regnetv_*', 'mobileone_*', 'repvgg_*', 'legacy_seresnet18',
    'legacy_seresnet34', 'cs3darknet_*', 'cs3sedarknet_[lx]', 'cs3*edgenet_*', 'cspdarknet*', 'darknet*', 'sedarknet*',
    'xception*p', 'vit_tiny_r_*', 'vit_base_mci_*',
)


def _make_entrypoint(variant: str, base: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and base == 'fbnetc_100':
            kwargs.setdefault('bn_eps', 1e-3)  # as in timm's entry point
        return build_eca_model(variant, base, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f'timm\'s {base} with ECA.'
    return entrypoint


_TWINS = {
    twin_name(base): base
    for family in FAMILIES
    for base in list_models(module=family, exclude_filters=_UNFIT)
    if not base.startswith('eca_') and not is_model(twin_name(base))
}
default_cfgs = generate_default_cfgs({
    name: cfg for variant, base in _TWINS.items() for name, cfg in eca_cfgs(variant, base).items()
})
for _variant, _base in _TWINS.items():
    globals()[_variant] = register_model(_make_entrypoint(_variant, _base))
