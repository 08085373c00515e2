"""The channel weights of images: collected, summarized, and written as tensors and as a table."""
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn as nn
from timm.utils import natural_key

from timm_eca.analysis.evaluate import Batches
from timm_eca.analysis.gates import gates
from timm_eca.analysis.images import Images
from timm_eca.errors import printable
from timm_eca.analysis.tables import write_csv
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.digests import save_weights

__all__ = [
    'class_means', 'collect_gates', 'describe_constant', 'describe_statistics', 'gate_statistics', 'is_constant',
    'last_of_stages', 'write_gates',
]

CONSTANT = 0.01  # channel weights that differ by less are called constant

Gates = Mapping[str, torch.Tensor]  # (images, channels) for the name of each layer


def collect_gates(
        model: nn.Module,
        batches: Iterable[Images],
        layers: Sequence[str] | None = None,
) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Computes the channel weights of image files.

    Args:
        model: A model with ECA.
        batches: Images with their paths, as of `read_images`.
        layers: Names of ECA layers, or of modules that they are in, or patterns of names. None: all layers.

    Returns:
        The channel weights of each layer, (images, channels), and the images that they are of.

    Raises:
        ValueError: The model has no ECA, or none of that name.
    """
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    read: list[Path] = []
    for pixels, paths in batches:
        found = gates(model, pixels)
        for name in found if layers is None else _matching(list(found), layers):
            collected[name].append(found[name].cpu())
        read += paths
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
    return (values.max() - values.min()).item() < CONSTANT


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
    classes, means = class_means(collected, images)
    write_csv(table, [['layer', 'channel', *classes], *(
        [name, channel, *(f'{value:.6f}' for value in values)]
        for name, by_class in means.items() for channel, values in enumerate(by_class.T.tolist()))])
    return [tensors, table]


def gate_statistics(model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """Of each ECA layer: number of images, sum, sum of squares, minus the lowest and the highest gate, (5, channels).

    For datasets whose channel weights are too many to collect.

    Raises:
        ValueError: The model has no ECA.
    """
    weight = next(model.parameters())

    def of_batch(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {name: x.double().cpu() for name, x in gates(model, images.to(weight.device, weight.dtype)).items()}
        return {
            name: torch.stack([torch.full_like(x[0], len(x)), x.sum(0), (x * x).sum(0), -x.amin(0), x.amax(0)])
            for name, x in found.items()
        }

    return _merge(of_batch(images) for images, _ in batches)


def _merge(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, x in part.items():
            y = merged.get(name)
            merged[name] = x if y is None else torch.cat([x[:3] + y[:3], torch.maximum(x[3:], y[3:])])
    return merged


def describe_statistics(parts: Iterable[dict[str, torch.Tensor]]) -> str | None:
    """One or two sentences on what `gate_statistics` found in the parts of a dataset; None where it found nothing."""
    merged = _merge(parts)
    if not merged:
        return None
    count, total, squares, lowest, highest = torch.cat(list(merged.values()), 1)
    deviation = (squares / count - (total / count) ** 2).clamp(min=0).sqrt().mean()
    text = f'{-lowest.max():.4f} to {highest.max():.4f}, standard deviation between images {deviation:.4f}'
    constant = [name for name, x in merged.items() if (x[4].max() + x[3].max()).item() < CONSTANT]
    if not constant:
        return f'{text}. They differ by more than {CONSTANT} in each of the {len(merged)} layers.'
    where = 'all' if len(constant) == len(merged) else f'{len(constant)} of'
    return (
        f'{text}. They are still constant (they differ by less than {CONSTANT}) in {where} {len(merged)} layers: '
        f'the attention has learned nothing there ({", ".join(constant)}).')
