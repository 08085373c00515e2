"""timm's residual blocks with ECA after their last norm, before the shortcut is added.

Each class here is timm's own block with another `forward` and one more child, `eca`. Nothing else differs, so an
instance of the timm block becomes one of these by taking the class (`timm_eca.models.insert`), and keeps all it
has.
"""
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# Private, since timm exports the blocks of the EfficientNet builder nowhere else.
from timm.models._efficientnet_blocks import (
    CondConvResidual,
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    MobileAttention,
    UniversalInvertedResidual,
)
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.rexnet import LinearBottleneck

from timm_eca.layers.fused import fused_tail

__all__ = [
    'BLOCKS', 'PLAIN_BLOCKS', 'UNFIT_BLOCKS', 'BlockSite', 'EcaBasicBlock', 'EcaBottle2neck', 'EcaBottleneck',
    'EcaCondConvResidual', 'EcaDepthwiseSeparableConv', 'EcaEdgeResidual', 'EcaInvertedResidual',
    'EcaLinearBottleneck', 'EcaRegNetBottleneck', 'EcaUniversalInvertedResidual', 'find_site',
]


class EcaBasicBlock(BasicBlock):
    """Two 3x3 convolutions and ECA (ECA-Net18 and 34)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)

        x = self.drop_block(self.bn1(self.conv1(x)))
        x = self.aa(self.act1(x))

        if not torch.jit.is_scripting() and self.se is None:
            out = fused_tail(x, self.conv2, self.bn2, self.eca, shortcut, self.drop_path, self.act2)
            if out is not None:
                return out
        x = self.eca(self.bn2(self.conv2(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        x += shortcut
        return self.act2(x)


class EcaBottleneck(Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and ECA (ECA-Net50, 101 and 152)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)

        x = self.act1(self.bn1(self.conv1(x)))

        x = self.drop_block(self.bn2(self.conv2(x)))
        x = self.aa(self.act2(x))

        if not torch.jit.is_scripting() and self.se is None:
            out = fused_tail(x, self.conv3, self.bn3, self.eca, shortcut, self.drop_path, self.act3)
            if out is not None:
                return out
        x = self.eca(self.bn3(self.conv3(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        x += shortcut
        return self.act3(x)


class EcaBottle2neck(Bottle2neck):
    """Res2Net's bottleneck, whose 3x3 convolutions feed each other, and ECA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)

        splits = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        outputs = []
        last = splits[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            last = splits[i] if i == 0 or self.is_first else last + splits[i]
            last = self.relu(bn(conv(last)))
            outputs.append(last)
        if self.scale > 1:
            outputs.append(splits[-1] if self.pool is None else self.pool(splits[-1]))
        x = self.drop_block(torch.cat(outputs, 1))

        if not torch.jit.is_scripting() and self.se is None:
            out = fused_tail(x, self.conv3, self.bn3, self.eca, shortcut, self.drop_path, self.relu)
            if out is not None:
                return out
        x = self.eca(self.bn3(self.conv3(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        x += shortcut
        return self.relu(x)


class EcaRegNetBottleneck(RegNetBottleneck):
    """RegNet's bottleneck and ECA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = self.se(self.conv2(self.conv1(x)))
        if not torch.jit.is_scripting():
            out = fused_tail(
                x, self.conv3, None, self.eca, None if self.downsample is None else shortcut, self.drop_path, self.act3)
            if out is not None:
                return out
        x = self.eca(self.conv3(x))
        if self.downsample is not None:
            x = self.drop_path(x) + shortcut
        return self.act3(x)


class EcaLinearBottleneck(LinearBottleneck):
    """ReXNet's linear bottleneck, whose shortcut covers its first channels, and ECA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.conv_exp is not None:
            x = self.conv_exp(x)
        x = self.conv_dw(x)
        if self.se is not None:
            x = self.se(x)
        x = self.act_dw(x)
        if torch.jit.is_scripting():
            x = self.eca(self.conv_pwl(x))
        else:
            out = fused_tail(x, self.conv_pwl, None, self.eca)
            x = self.eca(self.conv_pwl(x)) if out is None else out
        if self.use_shortcut:
            if self.drop_path is not None:
                x = self.drop_path(x)
            x = torch.cat([x[:, :self.in_channels] + shortcut, x[:, self.in_channels:]], dim=1)
        return x


class EcaDepthwiseSeparableConv(DepthwiseSeparableConv):
    """Depthwise and linear 1x1 convolution and ECA (the first block of ECA-MobileNetV2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.aa(self.bn1(self.conv_dw(x)))
        x = self.se(x)

        if not torch.jit.is_scripting():
            out = fused_tail(x, self.conv_pw, self.bn2, self.eca, shortcut if self.has_skip else None, self.drop_path)
            if out is not None:
                return out
        x = self.eca(self.bn2(self.conv_pw(x)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class EcaInvertedResidual(InvertedResidual):
    """Expanding 1x1, depthwise and linear 1x1 convolution and ECA (ECA-MobileNetV2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.bn1(self.conv_pw(x))
        x = self.aa(self.bn2(self.conv_dw(x)))
        x = self.se(x)

        if not torch.jit.is_scripting():
            out = fused_tail(x, self.conv_pwl, self.bn3, self.eca, shortcut if self.has_skip else None, self.drop_path)
            if out is not None:
                return out
        x = self.eca(self.bn3(self.conv_pwl(x)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class EcaCondConvResidual(CondConvResidual):
    """Inverted residual with convolutions mixed for each image, and ECA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        routing_weights = self.routing_fn(F.adaptive_avg_pool2d(x, 1).flatten(1)).sigmoid()
        x = self.bn1(self.conv_pw(x, routing_weights))
        x = self.bn2(self.conv_dw(x, routing_weights))
        x = self.se(x)

        x = self.eca(self.bn3(self.conv_pwl(x, routing_weights)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class EcaEdgeResidual(EdgeResidual):
    """Expanding k x k and linear 1x1 convolution and ECA (EfficientNet-EdgeTPU and V2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.aa(self.bn1(self.conv_exp(x)))
        x = self.se(x)
        if not torch.jit.is_scripting():
            out = fused_tail(x, self.conv_pwl, self.bn2, self.eca, shortcut if self.has_skip else None, self.drop_path)
            if out is not None:
                return out
        x = self.eca(self.bn2(self.conv_pwl(x)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class EcaUniversalInvertedResidual(UniversalInvertedResidual):
    """MobileNetV4's inverted residual and ECA, before the layer scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dw_mid(self.pw_exp(self.dw_start(x)))
        x = self.se(x)
        if torch.jit.is_scripting():
            x = self.eca(self.dw_end(self.pw_proj(x)))
        else:
            out = fused_tail(x, self.pw_proj, None, self.eca, after_norm=self.dw_end)
            x = self.eca(self.dw_end(self.pw_proj(x))) if out is None else out
        x = self.layer_scale(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class BlockSite(NamedTuple):
    """Where ECA stands in a block."""
    norm_name: str  # name of the last norm, e.g. 'bn3' or 'conv3.bn'; ECA follows the child that this is in
    norm: nn.Module
    conv: Any  # the last convolution: its output channels are ECA's, its device and dtype too


# Of each timm block: the block with ECA, and its last convolution and norm, or several of which the first is last that
# is there.
BLOCKS: dict[type[nn.Module], tuple[type[nn.Module], tuple[tuple[str, str], ...]]] = {
    BasicBlock: (EcaBasicBlock, (('conv2', 'bn2'),)),
    Bottleneck: (EcaBottleneck, (('conv3', 'bn3'),)),
    Bottle2neck: (EcaBottle2neck, (('conv3', 'bn3'),)),
    RegNetBottleneck: (EcaRegNetBottleneck, (('conv3.conv', 'conv3.bn'),)),
    LinearBottleneck: (EcaLinearBottleneck, (('conv_pwl.conv', 'conv_pwl.bn'),)),
    DepthwiseSeparableConv: (EcaDepthwiseSeparableConv, (('conv_pw', 'bn2'),)),
    InvertedResidual: (EcaInvertedResidual, (('conv_pwl', 'bn3'),)),
    CondConvResidual: (EcaCondConvResidual, (('conv_pwl', 'bn3'),)),
    EdgeResidual: (EcaEdgeResidual, (('conv_pwl', 'bn2'),)),
    UniversalInvertedResidual: (
        EcaUniversalInvertedResidual, (('dw_end.conv', 'dw_end.bn'), ('pw_proj.conv', 'pw_proj.bn'))),
}
PLAIN_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {block: plain for plain, (block, _) in BLOCKS.items()}
# Blocks of the same networks that end in no norm, or in one with an activation.
UNFIT_BLOCKS: tuple[type[nn.Module], ...] = (ConvBnAct, MobileAttention)


def find_site(block: nn.Module) -> BlockSite | None:
    """Where ECA stands in a timm block or, if the block has it, the same block with ECA. None: nowhere.

    A block whose last norm carries an activation, or is none any more, has no place for it.
    """
    for conv_name, norm_name in BLOCKS[PLAIN_BLOCKS.get(type(block), type(block))][1]:
        if isinstance(getattr(block, norm_name.partition('.')[0]), nn.Identity):
            continue
        norm = block.get_submodule(norm_name)
        activated = not isinstance(getattr(norm, 'act', None), nn.Identity | type(None))
        if activated or isinstance(norm, nn.Identity):
            return None
        return BlockSite(norm_name, norm, block.get_submodule(conv_name))
    return None
