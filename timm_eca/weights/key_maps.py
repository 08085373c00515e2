"""The names of the tensors in the official code and in timm, mapped both ways.

The residual networks have the same names in both. The official MobileNetV2 has torchvision's, where a block is a
sequence: `features.2.conv.1.0.weight` is the depthwise convolution of timm's `blocks.1.0`.
"""
from collections.abc import Mapping
from typing import TypeVar

import torch

__all__ = ['GATE', 'kernel_sizes_by_stage', 'kernel_sizes_of', 'to_official', 'to_timm']

T = TypeVar('T')

GATE = '.eca.conv.weight'  # how the name of an ECA layer's weights ends, in timm's names

# Number of blocks in each stage of MobileNetV2 (paper arXiv:1801.04381, table 2); official blocks are counted through.
_MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)


# The modules of a block by timm's names: of the first block, which does not expand, and of the others.
_OFFICIAL_BLOCKS = (
    {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2', '3.conv': 'eca.conv'},
    {
        '0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3',
        '4.conv': 'eca.conv',
    },
)
# Of the plain MobileNetV2 as it was before torchvision nested its layers; weights of that kind are still about.
_FLAT_BLOCKS = (
    {'0': 'conv_dw', '1': 'bn1', '3': 'conv_pw', '4': 'bn2'},
    {'0': 'conv_pw', '1': 'bn1', '3': 'conv_dw', '4': 'bn2', '6': 'conv_pwl', '7': 'bn3'},
)


def _mobilenetv2_modules(first_block: Mapping[str, str], block: Mapping[str, str]) -> dict[str, str]:
    """timm's module name of each module with weights, in the order of both."""
    modules = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1'}
    places = [(stage, i) for stage, depth in enumerate(_MOBILENETV2_DEPTHS) for i in range(depth)]
    for number, (stage, i) in enumerate(places, start=1):
        for name, timm in (first_block if number == 1 else block).items():
            modules[f'features.{number}.conv.{name}'] = f'blocks.{stage}.{i}.{timm}'
    head = len(places) + 1
    modules.update({f'features.{head}.0': 'conv_head', f'features.{head}.1': 'bn2', 'classifier.1': 'classifier'})
    return modules


_OFFICIAL_TO_TIMM = _mobilenetv2_modules(*_OFFICIAL_BLOCKS)
_FLAT_TO_TIMM = _mobilenetv2_modules(*_FLAT_BLOCKS)
_TIMM_TO_OFFICIAL = {timm: official for official, timm in _OFFICIAL_TO_TIMM.items()}


def _rename(state_dict: Mapping[str, T], modules: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for key, value in state_dict.items():
        module, _, tensor = key.rpartition('.')
        renamed[f'{modules[module]}.{tensor}' if module in modules else key] = value
    return renamed


def to_timm(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of an official ECA model, or of torchvision's plain one, to timm's names.

    A norm without `num_batches_tracked` (PyTorch before 0.4.1 wrote none) gets zero batches. Keys without a
    counterpart, timm's own among them, are left as they are.

    Args:
        state_dict: Tensors by official keys, without `module.`.

    Returns:
        A new dict with the same tensors.
    """
    renamed = dict(state_dict)
    if 'features.0.0.weight' in state_dict:  # MobileNetV2
        renamed = _rename(state_dict, _FLAT_TO_TIMM if 'features.1.conv.0.weight' in state_dict else _OFFICIAL_TO_TIMM)
    counted: dict[str, torch.Tensor] = {}
    for key, value in renamed.items():
        counted[key] = value
        norm, _, tensor = key.rpartition('.')
        count = f'{norm}.num_batches_tracked'
        if tensor == 'running_var' and count not in renamed:
            counted[count] = torch.tensor(0)
    return counted


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of `eca_resnet*` or `eca_mobilenetv2*` to the names of the official code.

    Args:
        state_dict: Tensors by timm's keys, e.g. `model.state_dict()`.

    Returns:
        A new dict with the same tensors, in the same order.
    """
    timm_mobilenetv2 = 'conv_stem.weight' in state_dict
    return _rename(state_dict, _TIMM_TO_OFFICIAL) if timm_mobilenetv2 else dict(state_dict)


def kernel_sizes_by_stage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The different ECA kernel sizes, ascending, that the blocks of each stage have, by timm's names of the stages."""
    stages: dict[str, set[int]] = {}
    for key, value in state_dict.items():
        if key.endswith(GATE):
            stages.setdefault(key.removesuffix(GATE).rpartition('.')[0], set()).add(value.shape[-1])
    return {stage: tuple(sorted(sizes)) for stage, sizes in stages.items()}


def kernel_sizes_of(state_dict: Mapping[str, torch.Tensor]) -> list[int]:
    """The ECA kernel sizes, by stage, of a model that has one in each."""
    return [size for sizes in kernel_sizes_by_stage(state_dict).values() for size in sizes]
