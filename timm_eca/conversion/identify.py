"""Finds out which model a checkpoint is of, from the names and shapes of its tensors.

Neither the name of the file nor the `arch` that it carries is trusted.
"""
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from timm.models import create_model, get_pretrained_cfg, list_models

from timm_eca.conversion.reader import CheckpointError
from timm_eca.errors import printable
from timm_eca.weights.key_maps import GATE, kernel_sizes_by_stage, to_official, to_timm
from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES

__all__ = ['Identity', 'identify']

Shapes = dict[str, tuple[int, ...]]


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

    def __str__(self) -> str:
        sizes = ', '.join(map(str, self.kernel_sizes))
        classes = f'{self.num_classes} classes' if self.num_classes else 'no classifier'
        ns = ' (ECA-NS)' if self.attn_layer == 'eca_ns' else ''
        return f'{self.model}{ns}, kernel sizes {sizes}, {classes}, {self.in_chans} input channels'


def _shapes(state_dict: Mapping[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in to_official(state_dict).items()}


@cache
def _shapes_of(model: str, **kwargs: Any) -> Shapes:
    """The shapes of a registered model's tensors by official names."""
    return _shapes(create_model(model, device='meta', **kwargs).state_dict())


def identify(state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike = 'The state dict') -> Identity:
    """Finds out which registered model a state dict is of, from the names and shapes of its tensors.

    Args:
        state_dict: Tensors by the names of the official code or of timm_eca, without the prefixes of wrappers.
        source: The file that it is from, for errors.

    Raises:
        CheckpointError: It is of none, or its kernel sizes are not odd and the same within each stage.
    """
    state_dict = to_timm(state_dict)
    stages = kernel_sizes_by_stage(state_dict)
    if not stages:
        raise CheckpointError(f'{source} is not an ECA network, it has no ECA kernels: name a checkpoint of ECA-Net.')
    for stage, sizes in stages.items():
        if len(sizes) > 1 or sizes[0] % 2 == 0:
            raise CheckpointError(
                f'{source}: the ECA kernel sizes of {stage} are {", ".join(map(str, sizes))[:80]}, but all blocks of a '
                'stage must have the same odd size. Convert an unmodified checkpoint.')

    # ECA-NS has a kernel for each channel, ECA one for all.
    kernel = next(value for key, value in state_dict.items() if key.endswith(GATE) and value.dim())
    attn_layer = 'eca_ns' if len(kernel) > 1 else 'eca'
    shapes = _shapes(state_dict)
    names = list_models(module=list(OFFICIAL_MODULES))
    model = min(names, key=lambda name: len(shapes.items() ^ _shapes_of(name, attn_layer=attn_layer).items()))
    cfg = get_pretrained_cfg(model, allow_unregistered=False)
    first_conv, classifier = (state_dict.get(f'{name}.weight') for name in (cfg.first_conv, cfg.classifier))
    identity = Identity(
        model,
        tuple(sizes[0] for sizes in stages.values()),
        len(classifier) if classifier is not None and classifier.dim() else 0,
        first_conv.shape[1] if first_conv is not None and first_conv.dim() == 4 else 3,
        attn_layer,
    )
    try:
        expected = _shapes_of(**identity._asdict())
    except Exception:  # timm's and torch's, for stages or sizes that the model can't have
        expected = _shapes_of(model, attn_layer=attn_layer)
    different = [f'{key} is missing' for key in expected if key not in shapes]
    different += [f'{printable(key)} is not known' for key in shapes if key not in expected]
    different += [
        f'{key} has shape {list(shapes[key])[:8]}, not {list(shape)}'
        for key, shape in expected.items() if shapes.get(key, shape) != shape]
    if different:
        more = f'; and {len(different) - 3} more' if len(different) > 3 else ''
        raise CheckpointError(
            f'{source} is not a whole ECA network of the authors\' code. The closest is {model}, but: '
            f'{"; ".join(different[:3])}{more}. Convert an unmodified, complete checkpoint.')
    return identity
