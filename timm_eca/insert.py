"""Puts ECA into the residual blocks of a timm model. The one way in which the models of this package are made."""
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch.nn as nn

from timm_eca.blocks import ECA_BLOCKS
from timm_eca.eca import EfficientChannelAttention, adaptive_kernel_size, check_kernel_size

__all__ = ['KernelSizes', 'insert_eca', 'resolve_kernel_sizes']

KernelSizes: TypeAlias = str | int | Sequence[int]
ModelT = TypeVar('ModelT', bound=nn.Module)


def resolve_kernel_sizes(kernel_sizes: Any, channels: Sequence[int]) -> tuple[int, ...]:
    """The kernel size of each stage.

    Args:
        kernel_sizes: One odd integer for each stage, one for all stages, or 'adaptive' (paper, eq. 12).
        channels: The number of channels of each stage's blocks.

    Raises:
        ValueError: It is none of these, or its length is not the number of stages.
    """
    if isinstance(kernel_sizes, str) and kernel_sizes == 'adaptive':
        return tuple(adaptive_kernel_size(c) for c in channels)
    try:
        if isinstance(kernel_sizes, Sequence) and not isinstance(kernel_sizes, str | bytes):
            if len(kernel_sizes) != len(channels):
                raise ValueError(f'there are {len(channels)} stages, not {len(kernel_sizes)}')
            return tuple(check_kernel_size(k) for k in kernel_sizes)
        return (check_kernel_size(kernel_sizes),) * len(channels)
    except ValueError as e:
        raise ValueError(
            f"kernel_sizes must be 'adaptive', one odd, positive integer, or a sequence of {len(channels)} such "
            f'integers, one for each stage; got {kernel_sizes!r}. {e}'
        ) from None


def insert_eca(model: ModelT, kernel_sizes: KernelSizes) -> ModelT:
    """Puts ECA after the last norm of each residual block of a timm model, in place.

    The layer's weights are `<block>.eca.conv.weight`, on the block's device and in its dtype. A stage is what holds
    a run of blocks in the model, e.g. `layer1` or `blocks.0`.

    Args:
        model: A timm model, not wrapped.
        kernel_sizes: One odd integer for each stage, one for all stages, or 'adaptive' (paper, eq. 12).

    Returns:
        The same model.

    Raises:
        ValueError: The kernel sizes are not accepted, or the model has no block that ECA could stand in.
    """
    stages: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if type(module) in ECA_BLOCKS:
            stages.setdefault(name.rpartition('.')[0], []).append(module)
    if not stages:
        families = ', '.join(sorted(block.__name__ for block in ECA_BLOCKS))
        raise ValueError(f'{type(model).__name__} has no block that ECA could stand in: there are {families}.')

    channels = []
    for blocks in stages.values():
        site = ECA_BLOCKS[type(blocks[-1])]
        channels.append(getattr(blocks[-1], site.conv).out_channels)
    for blocks, kernel_size in zip(stages.values(), resolve_kernel_sizes(kernel_sizes, channels)):
        for block in blocks:
            _insert_into_block(block, kernel_size)
    return model


def _insert_into_block(block: nn.Module, kernel_size: int) -> None:
    site = ECA_BLOCKS[type(block)]
    weight = getattr(block, site.conv).weight
    eca = EfficientChannelAttention(kernel_size, device=weight.device, dtype=weight.dtype)
    eca.train(block.training)

    block.__class__ = site.block
    # Children are listed in the order in which they were added: ECA's place is next to its norm, as in the official
    # models, so that what goes by order (optimizer states, timm's `remap_state_dict`) fits theirs.
    names = [name for name, _ in block.named_children()]
    followers = [(name, getattr(block, name)) for name in names[names.index(site.norm) + 1:]]
    for name, _ in followers:
        delattr(block, name)
    block.eca = eca
    for name, follower in followers:
        setattr(block, name, follower)
