"""The names of the tensors in the official code and in timm_eca, mapped both ways.

The residual networks have timm's names in both, but for ECA and the norm before it: `layer1.0.eca.conv.weight` and
`layer1.0.bn3.weight` are `layer1.0.bn3.attn.conv.weight` and `layer1.0.bn3.norm.weight` here. The official MobileNetV2
has torchvision's names, where a block is a sequence: `features.2.conv.1.0.weight` is the depthwise convolution of
timm's `blocks.1.0`.
"""
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch

__all__ = [
    'GATE', 'cut_kernels', 'kernel_sizes_by_stage', 'kernel_sizes_of', 'nest_norms', 'nested_names', 'stage_of',
    'to_official', 'to_timm',
]

T = TypeVar('T')

GATE = '.attn.conv.weight'  # how the name of an ECA layer's weights ends

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
_TIMM_MOBILENETV2 = re.compile(r'(blocks|conv_stem|conv_head|bn2|classifier)\.')  # how only its names begin


def _rename(state_dict: Mapping[str, T], modules: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for key, value in state_dict.items():
        module, _, tensor = key.rpartition('.')
        renamed[f'{modules[module]}.{tensor}' if module in modules else key] = value
    return renamed


def nest_norms(state_dict: Mapping[str, T], norms: Iterable[str]) -> dict[str, T]:
    """Renames the tensors of norms to where they are in a `NormAttn`: `<norm>.weight` to `<norm>.norm.weight`.

    A norm may be a sequence that ends in it: `<norm>.bn.weight` becomes `<norm>.norm.bn.weight`.

    Args:
        state_dict: Tensors by timm's names.
        norms: Names of the norms, e.g. `layer1.0.bn3`.
    """
    names, nested = set(norms), {}
    for key, value in state_dict.items():
        parts = key.split('.')
        norm = next((name for i in range(1, len(parts)) if (name := '.'.join(parts[:i])) in names), None)
        nested[key if norm is None else f'{norm}.norm.{key[len(norm) + 1:]}'] = value
    return nested


def to_timm(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of an official ECA model, or of torchvision's plain one, to the names of the models here.

    A norm without `num_batches_tracked` (PyTorch before 0.4.1 wrote none) gets zero batches. Keys without a
    counterpart, those of the models here among them, are left as they are.

    timm's own models with ECA are renamed, too: see `nested_names`.

    Args:
        state_dict: Tensors by official keys, without `module.`.

    Returns:
        A new dict with the same tensors.
    """
    renamed = dict(state_dict)
    if any(key.startswith('features.') for key in state_dict):
        flat = any(re.fullmatch(r'features\.\d+\.conv\.0\.weight', key) for key in state_dict)
        renamed = _rename(state_dict, _FLAT_TO_TIMM if flat else _OFFICIAL_TO_TIMM)
    names = nested_names(renamed)
    renamed = {names[key]: value for key, value in renamed.items()}
    counted: dict[str, torch.Tensor] = {}
    for key, value in _nest_attention(renamed).items():
        counted[key] = value
        if key.endswith('.running_var'):
            counted.setdefault(f'{key.removesuffix("running_var")}num_batches_tracked', torch.tensor(0))
    return counted


def _nest_attention(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Puts `<block>.eca` of the official models, and the norm before it, where they are in a `NormAttn`."""
    blocks = {key.partition('.eca.')[0] for key in state_dict if re.match(r'(blocks\.\d+|layer\d+)\.\d+\.eca\.', key)}
    norms = {block: f'{block}.bn3' if f'{block}.bn3.weight' in state_dict else f'{block}.bn2' for block in blocks}
    nested = {}
    for key, value in nest_norms(state_dict, norms.values()).items():
        block, _, tensor = key.partition('.eca.')
        nested[f'{norms[block]}.attn.{tensor}' if block in norms else key] = value
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
    """The stage of a network, e.g. `layer1` or `blocks.0`, that the block of a norm is in, e.g. `layer1.0.bn3`.

    A stage is what holds a run of blocks, and a block has a number: `0`, `b1` (RegNet), `tree1` (DLA).
    """
    modules = norm.split('.')[:-1]
    numbered = [i for i, module in enumerate(modules) if re.fullmatch(r'(b|block|res|tree)?\d+', module)]
    return '.'.join(modules[:numbered[-1] if numbered else -1])


def kernel_sizes_by_stage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The different ECA kernel sizes, ascending, that the blocks of each stage have, by timm's names of the stages."""
    stages: dict[str, set[int]] = {}
    for key, value in state_dict.items():
        if key.endswith(GATE) and value.dim():
            stages.setdefault(stage_of(key.removesuffix(GATE)), set()).add(value.shape[-1])
    return {stage: tuple(sorted(sizes)) for stage, sizes in stages.items()}


def kernel_sizes_of(state_dict: Mapping[str, torch.Tensor]) -> list[int]:
    """The ECA kernel sizes, by stage, of a model that has one in each."""
    return [size for sizes in kernel_sizes_by_stage(state_dict).values() for size in sizes]


# timm's own ECA in a block: `se` of its ResNets, `attn_last` of its ByobNets.
_TIMM_ECA = re.compile(r'(?:(layer\d+\.\d+)\.se|(.+)\.attn_last)\.conv\.weight')
# The last norm of such a block: the first of these that it has.
_LAST_NORMS = ('bn3', 'conv3.bn', 'conv3_1x1.bn', 'bn2', 'conv2.bn', 'conv2_kxk.bn')


def nested_names(names: Collection[str]) -> dict[str, str]:
    """The name here of each tensor of a timm model that has timm's own ECA behind the last norms of its blocks.

    `layer1.0.se.conv.weight` is `layer1.0.bn3.attn.conv.weight` here, and the norm `layer1.0.bn3` is nested. Other
    names stay. timm's circular ECA (`'ceca'`) has the same names: don't load its weights as ECA.

    Args:
        names: All names of the model's tensors.
    """
    gates = {}
    for match in filter(None, map(_TIMM_ECA.fullmatch, names)):
        block = match[1] or match[2]
        norm = next((f'{block}.{norm}' for norm in _LAST_NORMS if f'{block}.{norm}.weight' in names), None)
        if norm is not None:
            gates[match[0]] = norm + GATE
    nested = nest_norms({name: name for name in names}, (gate.removesuffix(GATE) for gate in gates.values()))
    return {name: gates.get(name, new) for new, name in nested.items()}


def cut_kernels(state_dict: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cuts the ECA kernels to the sizes that a model has, where all weights that are cut off are exactly zero.

    Such kernels compute the same. timm's own form of the authors' models has them.

    Args:
        state_dict: Tensors by the names of the models here.
        model: The tensors of the model, of which only the shapes count.

    Raises:
        ValueError: A kernel has an even size.
    """
    fitted = dict(state_dict)
    for key, value in state_dict.items():
        if key.endswith(GATE) and key in model and value.shape[:-1] == model[key].shape[:-1]:
            surplus = value.shape[-1] - model[key].shape[-1]
            if surplus % 2:
                raise ValueError(f'The ECA kernel {key} has the even size {value.shape[-1]}: it must be odd.')
            if surplus > 0:
                inner = value[..., surplus // 2:-(surplus // 2)]
                if value.count_nonzero() == inner.count_nonzero():
                    fitted[key] = inner.contiguous()
    return fitted
