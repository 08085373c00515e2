"""Collects the channel weights of images, summarizes them, and writes them as tensors and as a table."""
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_eca.analysis.gates import gates
from timm_eca.analysis.tables import write_csv
from timm_eca.errors import printable
from timm_eca.images.files import natural_order
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.digests import save_weights

__all__ = [
    'class_means', 'collect_gates', 'describe_gates', 'deviation', 'is_constant', 'last_of_stages', 'title_of',
    'write_gates',
]

CONSTANT = 0.01  # channel weights that differ by less count as constant
# The stage and the block in timm's names: layer1.0, blocks.3.2, stages.0.blocks.1, s2.b1.
_BLOCK = re.compile(r'(?:layer|blocks\.|stages\.|s)(\d+)\.(?:blocks\.|b)?(\d+)\b')

Gates = Mapping[str, torch.Tensor]  # (images, channels) for the name of each layer


def collect_gates(
        model: nn.Module,
        batches: Iterable[tuple[torch.Tensor, Any]],
        layers: Sequence[str] | None = None,
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Computes the channel weights of images.

    Args:
        model: A model with ECA.
        batches: Images and their labels.
        layers: Names of ECA layers, of modules that contain them, or patterns of names. None: all layers.

    Returns:
        The channel weights of each layer, (images, channels), and the labels of the images.

    Raises:
        ValueError: The model has no ECA, or no ECA layer of such a name.
    """
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    read: list[Any] = []
    weight = next(model.parameters())
    for pixels, labels in batches:
        found = gates(model, pixels.to(weight.device, weight.dtype))
        for name in found if layers is None else _matching(list(found), layers):
            collected[name].append(found[name].cpu())
        read += labels
    return {name: torch.cat(values).contiguous() for name, values in collected.items()}, read


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    matching = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')}
        if not found:
            raise ValueError(f'No ECA layer is called {pattern}, the first is {names[0]}, the last {names[-1]}')
        matching |= found
    return [name for name in names if name in matching]


def last_of_stages(collected: Gates) -> dict[str, torch.Tensor]:
    """The last layer of each stage: the stage is the name up to the first number, as in layer1, stages.0, blocks.3."""
    ends = {re.sub(r'(\d+).*', r'\1', name): name for name in collected}
    return {name: collected[name] for name in ends.values()}


def title_of(name: str) -> str:
    """The stage and the block of a layer, counted as in its name, or the name itself if it doesn't tell."""
    match = _BLOCK.match(name)
    return f'stage {match[1]}, block {match[2]}' if match else name


def is_constant(values: torch.Tensor) -> bool:
    """Whether a layer scales all channels of all images by the same factor, as ECA does before training."""
    return (values.max() - values.min()).item() < CONSTANT


def describe_gates(collected: Gates) -> str:
    """Describes the channel weights of some layers, and names the layers with constant ones."""
    every = torch.cat(list(collected.values()), 1)
    text = f'{every.min():.4f} to {every.max():.4f}, standard deviation between images {deviation(every):.4f}.'
    constant = [name for name, values in collected.items() if is_constant(values)]
    if not constant:
        return f'{text} They differ by more than {CONSTANT} in each of the {len(collected)} layers.'
    count = len(constant)
    where = f'all {count} layers' if count == len(collected) else (
        f'{count} of {len(collected)} layers ({", ".join(constant)})')
    return (
        f'{text} They are constant (differ by less than {CONSTANT}) in {where}: ECA has learned nothing there, it '
        'scales all channels of all images by the same factor.')


def deviation(values: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a channel's weight between images, averaged over the channels."""
    return values.std(0, correction=0).mean()


def class_means(collected: Gates, images: Sequence[Path]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The classes (the folders of the images), and for each layer the class means, (classes, channels)."""
    folders = [Path(os.path.abspath(path)).parent.name for path in images]
    classes = sorted(set(folders), key=natural_order)
    numbers = {name: i for i, name in enumerate(classes)}
    index = torch.tensor([numbers[name] for name in folders])
    counts = torch.bincount(index)[:, None]
    return classes, {
        name: values.new_zeros(len(classes), values.shape[1]).index_add_(0, index, values) / counts
        for name, values in collected.items()
    }


def write_gates(folder: Path, collected: Gates, images: Sequence[Path]) -> list[Path]:
    """Writes `gates.safetensors`, the channel weights of each image, and `gates.csv`, the means for each class.

    Raises:
        OSError: The files can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, table = folder / 'gates.safetensors', folder / 'gates.csv'
    metadata = {'format': 'pt', 'images': '\n'.join(printable(str(path), 4096) for path in images)}
    atomic_write(tensors, lambda new: save_weights(collected, new, metadata))
    classes, means = class_means(collected, images)
    write_csv(table, [['layer', 'channel', *classes], *(
        [name, channel, *(f'{value:.6f}' for value in values)]
        for name, by_class in means.items() for channel, values in enumerate(by_class.T.tolist()))])
    return [tensors, table]
