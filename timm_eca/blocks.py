"""timm's residual blocks with ECA after their last norm, before the shortcut is added.

Each class here is timm's own block with another `forward` and one more child, `eca`. Nothing else differs, so an
instance of the timm block becomes one of these by taking the class (`timm_eca.insert`), and keeps all that it has.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
# Private, since timm exports the blocks of the EfficientNet builder nowhere else.
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck

__all__ = [
    'BlockSite', 'ECA_BLOCKS', 'EcaBasicBlock', 'EcaBottleneck', 'EcaDepthwiseSeparableConv', 'EcaInvertedResidual',
]


class EcaBasicBlock(BasicBlock):
    """Two 3x3 convolutions and ECA (ECA-Net18 and 34)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)

        x = self.drop_block(self.bn1(self.conv1(x)))
        x = self.aa(self.act1(x))

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

        x = self.eca(self.bn3(self.conv3(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        x += shortcut
        return self.act3(x)


class EcaDepthwiseSeparableConv(DepthwiseSeparableConv):
    """Depthwise and linear 1x1 convolution and ECA (the first block of ECA-MobileNetV2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.aa(self.bn1(self.conv_dw(x)))
        x = self.se(x)

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

        x = self.eca(self.bn3(self.conv_pwl(x)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class BlockSite(NamedTuple):
    """Where ECA stands in a block."""
    block: type[nn.Module]  # the block with ECA
    conv: str  # name of the block's last convolution
    norm: str  # name of the norm after it, which ECA follows


ECA_BLOCKS: dict[type[nn.Module], BlockSite] = {
    BasicBlock: BlockSite(EcaBasicBlock, 'conv2', 'bn2'),
    Bottleneck: BlockSite(EcaBottleneck, 'conv3', 'bn3'),
    DepthwiseSeparableConv: BlockSite(EcaDepthwiseSeparableConv, 'conv_pw', 'bn2'),
    InvertedResidual: BlockSite(EcaInvertedResidual, 'conv_pwl', 'bn3'),
}
