"""The names of the tensors in the official code and in timm_eca, mapped both ways.

The official ResNets have timm's names, except for ECA and the norm before it: `layer1.0.eca.conv.weight` and
`layer1.0.bn3.weight` are `layer1.0.bn3.attn.conv.weight` and `layer1.0.bn3.norm.weight` here. The official MobileNetV2
has torchvision's names, where a block is a sequence: `features.2.conv.1.0.weight` is the depthwise convolution of
timm's `blocks.1.0`.
"""
import re
from collections.abc import Mapping
from typing import TypeVar

import torch

__all__ = [
    'GATE', 'describe_kernel_sizes', 'kernel_sizes_by_stage', 'kernel_sizes_of', 'stage_of', 'to_official', 'to_timm',
]

T = TypeVar('T')

GATE = '.attn.conv.weight'  # end of the name of an ECA layer's weights

# Number of blocks in each stage of MobileNetV2 (paper arXiv:1801.04381, table 2); official blocks have running numbers.
_MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)

# The modules of the first block, which does not expand, and of the others, with timm's names.
_OFFICIAL_BLOCKS = (
    {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2', '3.conv': 'eca.conv'},
    {
        '0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3',
        '4.conv': 'eca.conv',
    },
)
# The plain MobileNetV2 before torchvision nested its layers. Such weights are still in use.
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
_TIMM_MOBILENETV2 = re.compile(r'(blocks|conv_stem|conv_head|bn2|classifier)\.')  # start of names that only it has
_BLOCK = re.compile(r'(layer\d+\.\d+|blocks\.\d+\.\d+)\.(.+)')
# ECA beside the norm: `eca`, the authors' name, or `se.conv`, timm's in ResNets.
_ATTENTION = re.compile(r'(layer\d+\.\d+(?=\.eca\.|\.se\.conv\.)|blocks\.\d+\.\d+(?=\.eca\.))\.(eca|se)\.')


def _rename(state_dict: Mapping[str, T], modules: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for key, value in state_dict.items():
        module, _, tensor = key.rpartition('.')
        renamed[f'{modules[module]}.{tensor}' if module in modules else key] = value
    return renamed


def to_timm(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of an official ECA model, or of torchvision's MobileNetV2, to the names of the models here.

    timm's ResNets with `EcaModule` (`layer1.0.se.conv.weight`) are renamed, too. A norm without `num_batches_tracked`
    (PyTorch before 0.4.1 wrote none) gets zero batches. Other keys stay as they are.

    Args:
        state_dict: Tensors by official keys, without `module.`.

    Returns:
        A new dict with the same tensors.
    """
    renamed = dict(state_dict)
    if any(key.startswith('features.') for key in state_dict):
        flat = any(re.fullmatch(r'features\.\d+\.conv\.0\.weight', key) for key in state_dict)
        renamed = _rename(state_dict, _FLAT_TO_TIMM if flat else _OFFICIAL_TO_TIMM)
    counted: dict[str, torch.Tensor] = {}
    for key, value in _nest_attention(renamed).items():
        counted[key] = value
        if key.endswith('.running_var'):
            counted.setdefault(f'{key.removesuffix("running_var")}num_batches_tracked', torch.tensor(0))
    return counted


def _nest_attention(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Moves the attention beside a norm, and that norm, to their places in a `NormAttn`."""
    places: dict[str, tuple[str, str]] = {}  # the attention and the norm of each block
    for key in state_dict:
        if match := _ATTENTION.match(key):
            block, attn = match.groups()
            places[block] = attn, 'bn3' if f'{block}.bn3.weight' in state_dict else 'bn2'
    nested = {}
    for key, value in state_dict.items():
        match = _BLOCK.match(key)
        if match and match[1] in places:
            attn, norm = places[match[1]]
            tensor = re.sub(rf'^{norm}\.', f'{norm}.norm.', match[2])
            key = f'{match[1]}.' + re.sub(rf'^{attn}\.', f'{norm}.attn.', tensor)
        nested[key] = value
    return nested


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of `eca_resnet*` or `eca_mobilenetv2*`, or a part of them, to those of the official code.

    Args:
        state_dict: Tensors by the keys of the models here, e.g. `model.state_dict()`.

    Returns:
        A new dict with the same tensors, in the same order.
    """
    flat = {
        re.sub(r'\.bn\d\.attn\.', '.eca.', re.sub(r'(\.bn\d)\.norm\.', r'\1.', key)): value
        for key, value in state_dict.items()
    }
    return _rename(flat, _TIMM_TO_OFFICIAL) if any(map(_TIMM_MOBILENETV2.match, flat)) else flat


def stage_of(norm: str) -> str:
    """The stage, e.g. `layer1` or `blocks.0`, of a block that has this norm, e.g. `layer1.0.bn3`.

    A stage holds a run of blocks, and a block has a number: `0`, `b1` (RegNet), `tree1` (DLA).
    """
    modules = norm.split('.')[:-1]
    numbered = [i for i, module in enumerate(modules) if re.fullmatch(r'(b|block|res|tree)?\d+', module)]
    return '.'.join(modules[:numbered[-1] if numbered else -1])


def kernel_sizes_by_stage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The different ECA kernel sizes, ascending, in the blocks of each stage, by timm's names of the stages."""
    stages: dict[str, set[int]] = {}
    for key, value in state_dict.items():
        if key.endswith(GATE) and value.dim():
            stages.setdefault(stage_of(key.removesuffix(GATE)), set()).add(value.shape[-1])
    return {stage: tuple(sorted(sizes)) for stage, sizes in stages.items()}


def kernel_sizes_of(state_dict: Mapping[str, torch.Tensor]) -> list[int]:
    """The ECA kernel sizes, by stage, as `kernel_sizes=` takes them.

    Only for models with one size in each stage. If a stage has several, the list has more sizes than the model has
    stages: use `describe_kernel_sizes` to print them.
    """
    return [size for sizes in kernel_sizes_by_stage(state_dict).values() for size in sizes]


def describe_kernel_sizes(state_dict: Mapping[str, torch.Tensor]) -> str:
    """The ECA kernel sizes, by stage, to print: '3, 5, 5, 7', or '3/5, 7' if a stage has two. Empty without ECA."""
    return ', '.join('/'.join(map(str, sizes)) for sizes in kernel_sizes_by_stage(state_dict).values())
