"""Finds out which model a checkpoint is of, from the names and shapes of its tensors.

Neither the name of the file nor the `arch` that it carries is trusted.
"""
import os
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from timm.models import create_model, get_pretrained_cfg, list_models

from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import printable
from timm_eca.weights.key_maps import GATE, kernel_sizes_by_stage, to_official, to_timm
from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES

__all__ = ['Identity', 'describe', 'identify']


class Identity(NamedTuple):
    """What a state dict is."""
    model: str  # name of the registered model
    kernel_sizes: tuple[int, ...]  # by stage
    num_classes: int  # 0 where there is no classifier
    in_chans: int
    attn_layer: str = 'eca'  # or 'eca_ns', of the authors' `eca_ns.py`

    @property
    def published(self) -> bool:
        """Whether its shapes are those of the checkpoint that the authors published for this model."""
        official = OFFICIAL.get(self.model)
        return official is not None and self[1:] == (official.kernel_sizes, 1000, 3, 'eca')


@cache
def _architectures(attn_layer: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors' shapes of each registered model by official names, with ECA kernels of size 1."""
    names = list_models(module=list(OFFICIAL_MODULES))
    models = {name: create_model(name, kernel_sizes=1, attn_layer=attn_layer, device='meta') for name in names}
    return {name: _official_shapes(model.state_dict()) for name, model in models.items()}


def _official_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in to_official(state_dict).items()}


def _free_names(model: str) -> list[str]:
    """The official names of the first convolution's weight and of the classifier's weight and bias."""
    cfg = get_pretrained_cfg(model, allow_unregistered=False)
    return list(to_official(dict.fromkeys(
        (f'{cfg.first_conv}.weight', f'{cfg.classifier}.weight', f'{cfg.classifier}.bias'), torch.empty(0))))


def identify(state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike = 'The state dict') -> Identity:
    """Finds out which registered model a state dict is of, from the names and shapes of its tensors.

    Args:
        state_dict: Tensors by the names of the official code or of timm_eca, without the prefixes of wrappers.
        source: The file that it is from, for errors.

    Raises:
        CheckpointError: It is of none, or its kernel sizes are not odd and the same within each stage.
    """
    state_dict = to_timm(state_dict)
    shapes = _official_shapes(state_dict)
    kernels = [tuple(value.shape) for key, value in state_dict.items() if key.endswith(GATE)]
    if not kernels:
        known = {key for expected in _architectures('eca').values() for key in expected}
        foreign = next((key for key in shapes if key not in known), None)
        what = repr(printable(foreign)) if foreign else 'the tensors of a plain network'
        raise CheckpointError(f'{source} is not an ECA network, it has {what} and no ECA kernels: name one of ECA-Net.')

    # ECA-NS has a kernel for each channel, ECA one for all.
    attn_layer = 'eca_ns' if all(shape[:1] > (1,) for shape in kernels) else 'eca'
    differences = {
        name: _difference(name, expected, shapes) for name, expected in _architectures(attn_layer).items()}
    model = min(differences, key=lambda name: len(differences[name]))
    difference = differences[model]
    if len(difference) > 9 and model.startswith('eca_mobilenetv2') and all('shape' in line for line in difference):
        raise CheckpointError(
            f'{source} is an ECA-MobileNetV2 of another width: only width 1.0 can be converted, as the authors\' code '
            'and timm round the channels of others differently.')
    if difference:
        listed = '; '.join(difference[:3]) + (f'; and {len(difference) - 3} more' if len(difference) > 3 else '')
        raise CheckpointError(
            f'{source} is not a whole ECA network of the authors\' code. The closest is {model}, but: {listed}. '
            'Convert an unmodified, complete checkpoint.')
    kernel_sizes = []
    for stage, sizes in kernel_sizes_by_stage(state_dict).items():
        if len(sizes) > 1 or sizes[0] % 2 == 0:
            raise CheckpointError(
                f'{source}: the ECA kernel sizes of {stage} are {", ".join(map(str, sizes))[:80]}, but all blocks of a '
                'stage must have the same odd size. Convert an unmodified checkpoint.')
        kernel_sizes.append(sizes[0])
    first_conv, classifier, _ = _free_names(model)
    num_classes = shapes[classifier][0] if classifier in shapes else 0
    return Identity(model, tuple(kernel_sizes), num_classes, shapes[first_conv][1], attn_layer)


def _difference(
        name: str,
        expected: Mapping[str, tuple[int, ...]],
        shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """What keeps tensors from being those of an architecture, whatever its kernels, input channels and classes are."""
    first_conv, weight, bias = _free_names(name)
    if weight not in shapes and bias not in shapes:  # a backbone
        expected = {key: shape for key, shape in expected.items() if key not in (weight, bias)}
    difference = [f'{key} is missing' for key in expected if key not in shapes]
    difference += [f'{printable(key)} is not known' for key in shapes if key not in expected]
    for key in expected.keys() & shapes.keys():
        shape, wanted = shapes[key], expected[key]
        free = {first_conv: 1, weight: 0, bias: 0}.get(key, 2 if len(wanted) == 3 else None)  # 3: a kernel of ECA
        if free is not None and len(shape) == len(wanted) and shape[free] > 0:
            wanted = (*wanted[:free], shape[free], *wanted[free + 1:])
        if shape != wanted:
            difference.append(f'{key} has shape {list(shape)[:8]}, not {list(wanted)}')
    if not difference and weight in shapes and shapes[weight][0] != shapes[bias][0]:
        difference.append(f'{weight} has shape {list(shapes[weight])} and {bias} {list(shapes[bias])}')
    return sorted(difference)


def describe(identity: Identity) -> str:
    """An identity in words."""
    sizes = ', '.join(map(str, identity.kernel_sizes))
    classes = f'{identity.num_classes} classes' if identity.num_classes else 'no classifier'
    ns = ' (ECA-NS)' if identity.attn_layer == 'eca_ns' else ''
    return f'{identity.model}{ns}, kernel sizes {sizes}, {classes}, {identity.in_chans} input channels'
