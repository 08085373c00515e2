"""The names of the tensors in the official code and in timm_eca, mapped both ways.

The official ResNets have timm's names, except for ECA and the norm before it (`nested_names`). The official MobileNetV2
has torchvision's names, where a block is a sequence: `features.2.conv.1.0.weight` is the depthwise convolution of
timm's `blocks.1.0`.
"""
import re
from collections.abc import Collection, Mapping

import torch

from timm_eca.errors import ModelError

__all__ = [
    'GATE', 'cut_kernels', 'describe_kernel_sizes', 'kernel_sizes_by_stage', 'nested_names', 'stage_of', 'to_official',
    'to_timm',
]

GATE = '.attn.conv.weight'  # end of the name of an ECA layer's weights

_MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)  # blocks of each stage (arXiv:1801.04381, table 2)

# timm's names of the modules in the first block, which does not expand, and in the others.
_OFFICIAL_BLOCKS = (
    {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2', '3.conv': 'eca.conv'},
    {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3', '4.conv': 'eca.conv'},
)
# The plain MobileNetV2 of older torchvision. Such weights are still in use.
_FLAT_BLOCKS = (
    {'0': 'conv_dw', '1': 'bn1', '3': 'conv_pw', '4': 'bn2'},
    {'0': 'conv_pw', '1': 'bn1', '3': 'conv_dw', '4': 'bn2', '6': 'conv_pwl', '7': 'bn3'},
)


def _mobilenetv2_modules(first_block: Mapping[str, str], block: Mapping[str, str]) -> dict[str, str]:
    """timm's name of each module with weights, in order."""
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
# The kernel of ECA beside a norm: in the authors' `eca`, in `attn_last` of timm's ByobNets, in `se` of its ResNets.
_KERNEL = re.compile(r'(.+)\.(?:eca|attn_last)\.conv\.weight|(.*layer\d+\.\d+)\.se\.conv\.weight')
# The last norm of such a block: the first of these that it has.
_LAST_NORMS = ('bn3', 'conv3.bn', 'conv3_1x1.bn', 'bn2', 'conv2.bn', 'conv2_kxk.bn')


def _rename(state_dict: Mapping[str, torch.Tensor], modules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        module, _, tensor = key.rpartition('.')
        renamed[f'{modules[module]}.{tensor}' if module in modules else key] = value
    return renamed


def to_timm(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of an official ECA model, or of timm's own model with ECA, to the names of this package.

    torchvision's MobileNetV2 gets timm's names. A norm without `num_batches_tracked` gets zero batches: PyTorch before
    0.4.1 wrote none. Other keys stay as they are, and the tensors are the same. The keys must not begin with `module.`.
    """
    renamed = dict(state_dict)
    if any(key.startswith('features.') for key in state_dict):
        flat = any(re.fullmatch(r'features\.\d+\.conv\.0\.weight', key) for key in state_dict)
        renamed = _rename(state_dict, _FLAT_TO_TIMM if flat else _OFFICIAL_TO_TIMM)
    names = nested_names(renamed)
    nested: dict[str, torch.Tensor] = {}
    for key, value in renamed.items():
        nested[names[key]] = value
        if key.endswith('.running_var'):
            nested.setdefault(f'{names[key].removesuffix("running_var")}num_batches_tracked', torch.tensor(0))
    return nested


def nested_names(names: Collection[str]) -> dict[str, str]:
    """The name in this package of each tensor of a model, or of a block, with ECA beside the last norms of its blocks.

    The authors' `layer1.0.eca.conv.weight` and timm's `layer1.0.se.conv.weight` are `layer1.0.bn3.attn.conv.weight`
    here, and the tensors of `layer1.0.bn3` are those of `layer1.0.bn3.norm`. Other names stay. timm's circular ECA
    (`'ceca'`) has the same names as ECA: don't load its weights as ECA.
    """
    gates = {}
    for match in filter(None, map(_KERNEL.fullmatch, names)):
        block = match[1] or match[2]
        norm = next((norm for norm in _LAST_NORMS if f'{block}.{norm}.weight' in names), 'bn2')
        gates[match[0]] = f'{block}.{norm}{GATE}'
    norms = tuple(gate.removesuffix(GATE) + '.' for gate in gates.values())
    nested = {}
    for name in names:
        norm = next((norm for norm in norms if name.startswith(norm)), '')
        nested[name] = gates.get(name) or (f'{norm}norm.{name.removeprefix(norm)}' if norm else name)
    return nested


def cut_kernels(state_dict: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cuts the ECA kernels to the sizes that a model has, if all weights that are cut off are exactly zero.

    Such kernels compute the same. timm's own form of the authors' models has them. Both arguments have the names of
    this package. A kernel of an even size raises a ModelError.
    """
    fitted = dict(state_dict)
    for key, value in state_dict.items():
        if key.endswith(GATE) and key in model and value.shape[:-1] == model[key].shape[:-1]:
            surplus = value.shape[-1] - model[key].shape[-1]
            if surplus % 2:
                raise ModelError(
                    f'The ECA kernel {key} has the even size {value.shape[-1]}', 'give weights with odd kernel sizes')
            if surplus > 0:
                inner = value[..., surplus // 2:-(surplus // 2)]
                if value.count_nonzero() == inner.count_nonzero():
                    fitted[key] = inner.contiguous()
    return fitted


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames all or some tensors of `eca_resnet*` or `eca_mobilenetv2*` to those of the official code, in order."""
    flat = {
        re.sub(r'\.bn\d\.attn\.', '.eca.', re.sub(r'(\.bn\d)\.norm\.', r'\1.', key)): value
        for key, value in state_dict.items()
    }
    return _rename(flat, _TIMM_TO_OFFICIAL) if any(map(_TIMM_MOBILENETV2.match, flat)) else flat


def stage_of(norm: str) -> str:
    """The stage, e.g. `layer1`, of the block with this norm, e.g. `layer1.0.bn3`. Blocks are numbered modules."""
    modules = norm.split('.')[:-1]
    numbered = [i for i, module in enumerate(modules) if re.fullmatch(r'(b|block|res|tree)?\d+', module)]
    return '.'.join(modules[:numbered[-1] if numbered else -1])


def kernel_sizes_by_stage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The different ECA kernel sizes, ascending, in the blocks of each stage, by the names of the stages."""
    stages: dict[str, set[int]] = {}
    for key, value in state_dict.items():
        if key.endswith(GATE) and value.dim():
            stages.setdefault(stage_of(key.removesuffix(GATE)), set()).add(value.shape[-1])
    return {stage: tuple(sorted(sizes)) for stage, sizes in stages.items()}


def describe_kernel_sizes(state_dict: Mapping[str, torch.Tensor]) -> str:
    """The ECA kernel sizes, by stage, to print: '3, 5, 5, 7', or '3/5, 7' if a stage has two. Empty without ECA."""
    return ', '.join('/'.join(map(str, sizes)) for sizes in kernel_sizes_by_stage(state_dict).values())
