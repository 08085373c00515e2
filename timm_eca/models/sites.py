"""Where attention stands in timm's residual blocks: behind the last norm, before the shortcut is added.

A family is added by a line for each of its blocks.
"""
from typing import NamedTuple

import torch.nn as nn

# Private, since timm exports the blocks of the EfficientNet builder nowhere else.
from timm.models._efficientnet_blocks import (
    CondConvResidual, ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual, MobileAttention,
    UniversalInvertedResidual,
)
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.rexnet import LinearBottleneck

__all__ = ['LAST_NORMS', 'UNFIT_BLOCKS', 'BlockSite', 'find_site']

# The last norm of each block; of several names the first that is there.
LAST_NORMS: dict[type[nn.Module], tuple[str, ...]] = {
    BasicBlock: ('bn2',),
    Bottleneck: ('bn3',),
    Bottle2neck: ('bn3',),
    RegNetBottleneck: ('conv3.bn',),
    LinearBottleneck: ('conv_pwl.bn',),
    DepthwiseSeparableConv: ('bn2',),
    InvertedResidual: ('bn3',),
    CondConvResidual: ('bn3',),
    EdgeResidual: ('bn2',),
    UniversalInvertedResidual: ('dw_end.bn', 'pw_proj.bn'),
}
# Blocks of the same networks that end in no norm, or in one with an activation.
UNFIT_BLOCKS: tuple[type[nn.Module], ...] = (ConvBnAct, MobileAttention)


class BlockSite(NamedTuple):
    """The last norm of a block."""
    name: str  # within the block, e.g. 'bn3' or 'conv3.bn'
    norm: nn.Module
    channels: int


def find_site(block: nn.Module) -> BlockSite | None:
    """Where attention stands in a timm block, or None where it has no place.

    A block whose last norm carries an activation, or is none any more, has no place.
    """
    for name in LAST_NORMS.get(type(block), ()):
        if isinstance(getattr(block, name.partition('.')[0]), nn.Identity):
            continue
        norm = block.get_submodule(name)
        activated = not isinstance(getattr(norm, 'act', None), nn.Identity | type(None))
        channels = next((getattr(norm, attribute) for attribute in _CHANNELS if hasattr(norm, attribute)), None)
        if activated or channels is None:
            return None
        return BlockSite(name, norm, channels if isinstance(channels, int) else channels[0])
    return None


_CHANNELS = ('num_features', 'num_channels', 'normalized_shape')  # what norms call the number of their channels
