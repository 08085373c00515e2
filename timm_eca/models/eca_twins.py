"""An `eca_` twin for every timm model that has a place for ECA.

`eca_<name>` is timm's `<name>` with ECA after the last norm of each residual block, and kernel sizes by the paper's
formula. The pretrained tags are those of timm's model, for warm starts.
"""
from timm.models import is_model, list_models

from timm_eca.models.builder import register_eca_models
from timm_eca.models.insert import FAMILIES, twin_name

# Networks that have ECA already, and those with no block that ends in a norm without an activation.
_UNFIT = (
    'ecares*', 'lcnet_*', 'mobilenetv1_*', 'regnetv_*', 'mobileone_*', 'repvgg_*', 'legacy_seresnet18',
    'legacy_seresnet34', 'cs3darknet_*', 'cs3sedarknet_[lx]', 'cs3*edgenet_*', 'cspdarknet*', 'darknet*', 'sedarknet*',
    'xception*p', 'vit_tiny_r_*', 'vit_base_mci_*',
)

register_eca_models(__name__, {
    twin_name(base): base
    for family in FAMILIES
    for base in list_models(module=family, exclude_filters=_UNFIT)
    if not base.startswith('eca_') and not is_model(twin_name(base))
})
