"""The places of attention in timm's residual blocks: behind the last norm, before the shortcut is added.

To add a family, add a line for each of its blocks.
"""
from typing import Any, NamedTuple

import torch.nn as nn
from timm.models import (
    byobnet, convmixer, cspnet, dla, efficientvit_mit, regnet, repvit, res2net, resnest, resnet, resnetv2, rexnet,
    senet, sknet, tresnet, xception_aligned,
)

# Private, since timm exports the blocks of the EfficientNet builder nowhere else.
from timm.models._efficientnet_blocks import (
    CondConvResidual, DepthwiseSeparableConv, EdgeResidual, InvertedResidual, UniversalInvertedResidual,
)
from timm.models.xception import Block as XceptionBlock  # timm.models.xception is a function

from timm_eca.layers.norm_attn import scaled_norm

__all__ = ['LAST_NORMS', 'BlockSite', 'find_site']

# The last norm of each block: the first of these names that it has. `rep.*` is the last norm of the sequence `rep`.
# RepVit's `conv2`, a convolution and a norm, stays whole, because timm fuses it into one convolution.
LAST_NORMS: dict[type[nn.Module], tuple[str, ...]] = {
    resnet.BasicBlock: ('bn2',),
    resnet.Bottleneck: ('bn3',),
    res2net.Bottle2neck: ('bn3',),
    resnest.ResNestBottleneck: ('bn3',),
    sknet.SelectiveKernelBasic: ('conv2.bn',),
    sknet.SelectiveKernelBottleneck: ('conv3.bn',),
    resnetv2.Bottleneck: ('norm3',),
    senet.SEBottleneck: ('bn3',),
    senet.SEResNetBottleneck: ('bn3',),
    senet.SEResNeXtBottleneck: ('bn3',),
    regnet.Bottleneck: ('conv3.bn',),
    tresnet.BasicBlock: ('conv2.bn',),
    tresnet.Bottleneck: ('conv3.bn',),
    dla.DlaBasic: ('bn2',),
    dla.DlaBottleneck: ('bn3',),
    dla.DlaBottle2neck: ('bn3',),
    byobnet.BasicBlock: ('conv2_kxk.bn',),
    byobnet.BottleneckBlock: ('conv3_1x1.bn',),
    byobnet.DarkBlock: ('conv2_kxk.bn',),
    byobnet.EdgeBlock: ('conv2_1x1.bn',),
    byobnet.SelfAttnBlock: ('conv3_1x1.bn',),
    cspnet.BottleneckBlock: ('conv3.bn',),
    rexnet.LinearBottleneck: ('conv_pwl.bn',),
    DepthwiseSeparableConv: ('bn2',),
    InvertedResidual: ('bn3',),
    CondConvResidual: ('bn3',),
    EdgeResidual: ('bn2',),
    UniversalInvertedResidual: ('dw_end.bn', 'pw_proj.bn'),
    efficientvit_mit.ConvBlock: ('conv2.norm',),
    efficientvit_mit.DSConv: ('point_conv.norm',),
    efficientvit_mit.FusedMBConv: ('point_conv.norm',),
    efficientvit_mit.MBConv: ('point_conv.norm',),
    efficientvit_mit.LiteMLA: ('proj.norm',),
    XceptionBlock: ('rep.*',),
    xception_aligned.XceptionModule: ('stack.conv3.bn_pw',),
    convmixer.Residual: ('fn.2',),
    repvit.RepVitMlp: ('conv2',),
}


class BlockSite(NamedTuple):
    """The last norm of a block, or the sequence of a convolution and that norm."""
    name: str  # within the block, e.g. 'bn3' or 'conv3.bn'
    norm: nn.Module
    channels: int


def find_site(block: nn.Module) -> BlockSite | None:
    """The place for attention in a timm block.

    None if the last norm has an activation or was fused away.
    """
    for name in LAST_NORMS.get(type(block), ()):
        if isinstance(getattr(block, name.partition('.')[0]), nn.Identity):
            continue
        parent, _, last = name.rpartition('.')
        holder = block.get_submodule(parent)
        if last == '*':
            last = next((child for child, module in reversed(holder._modules.items()) if _channels(module)), last)
        norm: Any = getattr(holder, last, None)
        channels = _channels(norm)
        # In timm's ConvNormAct the activation is in the norm, in other blocks beside it.
        activations = [getattr(norm, 'act', None)]
        if holder is not block:
            activations += [module for child, module in holder.named_children() if child.startswith('act')]
        activated = not all(isinstance(act, nn.Identity | type(None)) for act in activations)
        if channels is None or activated or getattr(norm, 'apply_act', False):
            return None
        return BlockSite(f'{parent}.{last}' if parent else last, norm, channels)
    return None


def _channels(module: nn.Module | None) -> int | None:
    """The number of channels of a norm, from its scale or variance. None for other modules."""
    norm: Any = scaled_norm(module) if module is not None else None
    values = (getattr(norm, name, None) for name in ('weight', 'running_var'))
    return next((len(value) for value in values if value is not None and value.ndim == 1), None)
