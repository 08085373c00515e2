"""Finds out which model a checkpoint is of, from the names and shapes of its tensors.

The name of the file is not trusted, nor is the `arch` in it.
"""
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.models import create_model, get_pretrained_cfg

from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import printable
from timm_eca.weights.key_maps import GATE, kernel_sizes_by_stage, to_official, to_timm
from timm_eca.weights.official import OFFICIAL

__all__ = ['Identity', 'identify']

# The number of blocks with ECA, and shapes of convolutions that tell the models apart. A test compares all with timm.
_RESNET = ('layer1.0.conv1', 'layer4.0.conv1', 'layer4.1.conv2')
_MOBILENETV2 = ('conv_stem', 'conv_head', 'blocks.6.0.conv_dw')
_BASIC = dict(zip(_RESNET, [(64, 64, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3)]))
_BOTTLENECK = dict(zip(_RESNET, [(64, 64, 1, 1), (512, 1024, 1, 1), (512, 512, 3, 3)]))
_FEATURES: dict[str, tuple[int, dict[str, tuple[int, int, int, int]]]] = {
    'eca_resnet18': (8, _BASIC),
    'eca_resnet34': (16, _BASIC),
    'eca_resnet50': (16, _BOTTLENECK),
    'eca_resnet101': (33, _BOTTLENECK),
    'eca_resnet152': (50, _BOTTLENECK),
    'eca_resnext50_32x4d': (16, dict(zip(_RESNET, [(128, 64, 1, 1), (1024, 1024, 1, 1), (1024, 32, 3, 3)]))),
    'eca_wide_resnet50_2': (16, dict(zip(_RESNET, [(128, 64, 1, 1), (1024, 1024, 1, 1), (1024, 1024, 3, 3)]))),
    'eca_mobilenetv2': (17, dict(zip(_MOBILENETV2, [(32, 3, 3, 3), (1280, 320, 1, 1), (960, 1, 3, 3)]))),
    'eca_mobilenetv2_050': (17, dict(zip(_MOBILENETV2, [(16, 3, 3, 3), (1280, 160, 1, 1), (480, 1, 3, 3)]))),
    'eca_mobilenetv2_140': (17, dict(zip(_MOBILENETV2, [(48, 3, 3, 3), (1792, 448, 1, 1), (1344, 1, 3, 3)]))),
}


class Identity(NamedTuple):
    """The model of a state dict, and its arguments."""
    model: str  # name of the registered model
    kernel_sizes: tuple[int, ...]  # by stage
    num_classes: int  # 0 without a classifier
    in_chans: int
    attn_layer: str = 'eca'  # or 'eca_ns', from the authors' `eca_ns.py`

    @property
    def published(self) -> bool:
        """Whether the authors published a checkpoint with these shapes."""
        official = OFFICIAL.get(self.model)
        return official is not None and self[1:] == (official.kernel_sizes, 1000, 3, 'eca')

    def __str__(self) -> str:
        sizes = ', '.join(map(str, self.kernel_sizes))
        classes = f'{self.num_classes} classes' if self.num_classes else 'no classifier'
        ns = ' (ECA-NS)' if self.attn_layer == 'eca_ns' else ''
        return f'{self.model}{ns}, kernel sizes {sizes}, {classes}, {self.in_chans} input channels'


def identify(state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike = 'The state dict') -> Identity:
    """Finds out which registered model a state dict is of, from the names and shapes of its tensors.

    Args:
        state_dict: Tensors by the names of the official code or of timm_eca, without the prefixes of wrappers.
        source: The file of the state dict, for errors.

    Raises:
        CheckpointError: It is of no registered model, or its kernel sizes are not odd and the same within each stage.
    """
    state_dict = to_timm(state_dict)
    stages = kernel_sizes_by_stage(state_dict)
    if not stages:
        raise CheckpointError(
            f'{source} is not an ECA network, it has no ECA kernels', 'name a checkpoint of ECA-Net')
    for stage, sizes in stages.items():
        if len(sizes) > 1 or sizes[0] % 2 == 0:
            raise CheckpointError(
                f'{source} has ECA kernels of sizes {", ".join(map(str, sizes))[:80]} in {stage}, but the blocks of a '
                'stage must have one odd size', 'convert an unmodified checkpoint')

    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    gates = [shape for key, shape in shapes.items() if key.endswith(GATE) and shape]

    def distance(model: str) -> tuple[int, int]:
        blocks, convs = _FEATURES[model]
        return sum(shapes.get(f'{conv}.weight') != shape for conv, shape in convs.items()), abs(blocks - len(gates))

    model = min(_FEATURES, key=distance)
    cfg = get_pretrained_cfg(model, allow_unregistered=False)
    first_conv, classifier = (shapes.get(f'{name}.weight', ()) for name in (cfg.first_conv, cfg.classifier))
    identity = Identity(
        model,
        tuple(sizes[0] for sizes in stages.values()),
        num_classes=classifier[0] if classifier else 0,
        in_chans=first_conv[1] or 3 if len(first_conv) == 4 else 3,
        attn_layer='eca_ns' if gates[0][0] > 1 else 'eca',  # ECA-NS has a kernel for each channel
    )
    network = create_model(
        model, num_classes=identity.num_classes, in_chans=identity.in_chans, attn_layer=identity.attn_layer,
        device='meta')
    different = _find_differences(to_official(state_dict), to_official(network.state_dict()))
    if different:
        problem = f'{source} is not a whole ECA network of the authors\' code'
        if len(different) < len(shapes):
            more = f'; and {len(different) - 3} more' if len(different) > 3 else ''
            problem += f'. The closest is {model}, but {"; ".join(different[:3])}{more}'
        raise CheckpointError(problem, 'convert an unmodified, complete checkpoint')
    return identity


def _find_differences(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors that a state dict lacks, has in addition, or has in another shape, in words."""
    different = [f'{key} is missing' for key in expected if key not in state_dict]
    different += [f'{printable(key)} is not known' for key in state_dict if key not in expected]
    for key in (key for key in expected if key in state_dict):
        found, wanted = list(state_dict[key].shape), list(expected[key].shape)
        if len(wanted) == 3:  # a kernel of ECA: all sizes are accepted
            wanted[2:] = found[2:]
        if found != wanted:
            different.append(f'{key} has shape {found[:8]}, not {wanted}')
    return different
