"""ECA-Net: residual networks with ECA.

The networks are timm's ResNets, with ECA after the last norm of every block. As in torchvision, the stride is on the
3x3 convolution.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from timm_eca.models.builder import register_eca_models

register_eca_models(__name__, {
    'eca_resnet18': 'resnet18',
    'eca_resnet34': 'resnet34',
    'eca_resnet50': 'resnet50',
    'eca_resnet101': 'resnet101',
    'eca_resnet152': 'resnet152',
    # The authors have no weights for these.
    'eca_resnext50_32x4d': 'resnext50_32x4d',
    'eca_wide_resnet50_2': 'wide_resnet50_2',
})
