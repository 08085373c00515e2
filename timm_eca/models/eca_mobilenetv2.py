"""ECA-MobileNetV2: MobileNetV2 with ECA.

The networks are timm's MobileNetV2, with ECA after the last norm of every inverted residual block, on its output
channels. The first block, which does not expand, has ECA, too. The authors trained with `drop_rate=0.25`.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
Weights: https://github.com/BangguWu/ECANet (MIT)
"""
from timm_eca.models.builder import register_eca_models

register_eca_models(__name__, {
    'eca_mobilenetv2': 'mobilenetv2_100',
    # The authors have no weights for these.
    'eca_mobilenetv2_050': 'mobilenetv2_050',
    'eca_mobilenetv2_140': 'mobilenetv2_140',
})
