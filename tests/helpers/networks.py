"""Networks as after training, an image for them, and the kinds of their blocks."""
import functools
import inspect
import re
from typing import Any

import torch
import torch.nn as nn
from timm.models import byobnet, create_model, cspnet, mobilevit, senet
from timm.models._efficientnet_blocks import ConvBnAct, MobileAttention
from timm.models.xception_aligned import PreXceptionModule
from torch.overrides import TorchFunctionMode

from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.models.sites import LAST_NORMS, find_site
from timm_eca.weights.key_maps import kernel_sizes_by_stage

__all__ = [
    'FAMILY_MODELS', 'NoValues', 'block_kinds', 'image', 'kernel_sizes_of', 'randomize_norms', 'trained',
    'unplaced_blocks',
]

# A small model of each family, with arguments that make it smaller.
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet': ('test_resnet', {}),
    'hrnet': ('hrnet_w18_small', {}),
    'res2net': ('res2net50_14w_8s', {'layers': (1, 1, 1, 1)}),
    'resnest': ('resnest14d', {}),
    'sknet': ('skresnet18', {'layers': (1, 1, 1, 1)}),
    'senet': ('legacy_seresnext26_32x4d', {'layers': (1, 1, 1, 1)}),
    'tresnet': ('tresnet_m', {'layers': (1, 1, 1, 1)}),
    'dla': ('dla46x_c', {}),
    'regnet': ('regnety_002', {}),
    'byobnet': ('test_byobnet', {}),
    'byoanet': ('botnet26t_256', {'img_size': 64}),
    'cspnet': ('cspresnet50', {}),
    'efficientnet': ('test_efficientnet', {}),
    'mobilenetv3': ('mobilenetv3_small_050', {}),
    'mobilenetv5': ('mobilenetv5_base', {'channel_multiplier': 0.25}),
    'hardcorenas': ('hardcorenas_a', {}),
    'rexnet': ('rexnet_100', {'depth_mult': 0.5}),
    'mobilevit': ('mobilevit_xxs', {}),
    'repvit': ('repvit_m0_9', {'depth': (1, 1, 2, 1)}),
    'efficientvit_mit': ('efficientvit_b0', {}),
    'xception': ('legacy_xception', {}),
    'xception_aligned': ('xception41', {}),
    'convmixer': ('convmixer_768_32', {}),
    'vision_transformer_hybrid': ('vit_small_r26_s32_224', {'img_size': 64, 'depth': 3}),
}


class NoValues(TorchFunctionMode):
    """Skips random values, which take most of the time to build a network on `meta`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def randomize_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights as after training. In a new network the last norms are zero and hide the rest."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def trained(name: str, **kwargs: Any) -> nn.Module:
    """A model as after training, in eval mode."""
    return randomize_norms(create_model(name, **kwargs)).eval()


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def kernel_sizes_of(state_dict: dict[str, torch.Tensor]) -> list[int]:
    """The ECA kernel sizes as `kernel_sizes=` takes them, for models with one size in each stage."""
    return [size for sizes in kernel_sizes_by_stage(state_dict).values() for size in sizes]


# Blocks that end in no norm, or in a norm with an activation.
UNFIT_BLOCKS = (
    ConvBnAct, MobileAttention, PreXceptionModule, byobnet.MobileOneBlock, byobnet.RepVggBlock, cspnet.DarkBlock,
    cspnet.EdgeBlock, mobilevit.MobileVitBlock, mobilevit.MobileVitV2Block, senet.SEResNetBlock,
)
_SHORTCUT = re.compile(r'\+=? (self\.)?(shortcut|residual|skip|identity)\b|\b(shortcut|residual|skip|identity) \+')


def unplaced_blocks(model: nn.Module) -> set[str]:
    """Classes of blocks with a shortcut but no attention, which are not known to have no place for it."""
    with_attention = {id(parent) for name, _ in named_norm_attn(model) for parent in _parents(model, name)}
    return {
        type(module).__name__ for module in model.modules()
        if id(module) not in with_attention and not isinstance(module, UNFIT_BLOCKS) and (
            (type(module) in LAST_NORMS and find_site(module) is not None) or _has_shortcut(type(module)))
    }


def _parents(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split('.')
    return [model.get_submodule('.'.join(parts[:i])) for i in range(len(parts))]


@functools.cache
def _has_shortcut(kind: type[nn.Module]) -> bool:
    # Of timm's models only, as torch's have no shortcuts.
    return kind.__module__.startswith('timm.models') and bool(_SHORTCUT.search(inspect.getsource(kind.forward)))


def block_kinds(model: nn.Module) -> set[tuple[type[nn.Module], ...]]:
    """The residual blocks of a model, each by its class and the classes of its modules."""
    return {tuple(map(type, block.modules())) for block in model.modules() if type(block) in LAST_NORMS}
