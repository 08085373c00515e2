"""The channel weights of images: collected, summarized, and written as tensors and as a table."""
import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn as nn
from timm.utils import natural_key

from timm_eca.analysis.gates import gates
from timm_eca.analysis.images import read_images
from timm_eca.errors import printable
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.digests import save_weights

__all__ = ['class_means', 'collect_gates', 'describe_constant', 'is_constant', 'last_of_stages', 'write_gates']

Gates = Mapping[str, torch.Tensor]  # (images, channels) for the name of each layer


def collect_gates(
        model: nn.Module,
        paths: Iterable[Path],
        unreadable: list[tuple[Path, str]],
        batch_size: int = 32,
        layers: Sequence[str] | None = None,
) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Computes the channel weights of image files.

    Args:
        model: A model with ECA.
        paths: Image files.
        unreadable: Gets each file that can't be read, and why.
        batch_size: Number of images in a batch.
        layers: Names of ECA layers, or of modules that they are in, or patterns of names. None: all layers.

    Returns:
        The channel weights of each layer, (images, channels), and the images that they are of.

    Raises:
        ValueError: The model has no ECA, or none of that name.
    """
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    read: list[Path] = []
    for batch in read_images(model, paths, batch_size, unreadable):
        found = gates(model, batch.pixels)
        for name in found if layers is None else _matching(list(found), layers):
            collected[name].append(found[name].cpu())
        read += batch.paths
    return {name: torch.cat(values).contiguous() for name, values in collected.items()}, read


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    matching = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')}
        if not found:
            raise ValueError(f'no ECA layer is called {pattern}: the first is {names[0]}, the last {names[-1]}.')
        matching |= found
    return [name for name in names if name in matching]


def last_of_stages(collected: Gates) -> dict[str, torch.Tensor]:
    """The last layer of each stage: the stage is the name up to the first number, as in layer1, stages.0, blocks.3."""
    ends = {re.sub(r'(\d+).*', r'\1', name): name for name in collected}
    return {name: collected[name] for name in ends.values()}


def is_constant(values: torch.Tensor) -> bool:
    """Whether a layer scales all channels of all images alike, as an ECA does that has not been trained."""
    return (values.max() - values.min()).item() < 0.01


def describe_constant(collected: Gates) -> str | None:
    """A sentence on the layers whose channel weights are constant, if there are any."""
    constant = [values for values in collected.values() if is_constant(values)]
    if not constant:
        return None
    low, high = min(v.min().item() for v in constant), max(v.max().item() for v in constant)
    return (
        f'The channel weights are constant ({low:.4f} to {high:.4f}) in {len(constant)} of {len(collected)} layers: '
        'ECA has learned nothing there, it scales all channels of all images alike.')


def class_means(collected: Gates, images: Sequence[Path]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The classes, which are the folders of the images, and the mean channel weights of each, (classes, channels)."""
    folders = [Path(os.path.abspath(path)).parent.name for path in images]
    classes = sorted(sorted(set(folders)), key=natural_key)
    numbers = {name: i for i, name in enumerate(classes)}
    index = torch.tensor([numbers[name] for name in folders])
    counts = torch.bincount(index)[:, None]
    return classes, {
        name: values.new_zeros(len(classes), values.shape[1]).index_add_(0, index, values) / counts
        for name, values in collected.items()
    }


def write_gates(folder: Path, collected: Gates, images: Sequence[Path]) -> list[Path]:
    """Writes `gates.safetensors`, the channel weights of each image, and `gates.csv`, the means over each class.

    Raises:
        OSError: They can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, table = folder / 'gates.safetensors', folder / 'gates.csv'
    metadata = {'format': 'pt', 'images': '\n'.join(printable(str(path), 4096) for path in images)}
    atomic_write(tensors, lambda new: save_weights(collected, new, metadata))
    atomic_write(table, lambda new: _write_table(new, *class_means(collected, images)))
    return [tensors, table]


def _write_table(path: Path, classes: Sequence[str], means: Gates) -> None:
    with path.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.writer(file)
        writer.writerow(['layer', 'channel', *classes])
        for name, by_class in means.items():
            for channel, values in enumerate(by_class.T.tolist()):
                writer.writerow([name, channel, *(f'{value:.6f}' for value in values)])
