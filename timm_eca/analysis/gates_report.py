"""The channel weights of images as files: a table, the tensors, and the paper's figure, means over each class."""
import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from timm_eca.analysis.gates import gates
from timm_eca.analysis.images import read_images
from timm_eca.errors import printable
from timm_eca.weights.atomic import atomic_write

__all__ = ['ClassMeans', 'collect_gates', 'draw_gates', 'write_gates']

ClassMeans = Mapping[str, Mapping[str, torch.Tensor]]


def collect_gates(
        model: nn.Module,
        paths: Iterable[Path],
        unreadable: list[tuple[Path, str]],
        batch_size: int = 32,
) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """The gates of images, (images, channels) for the name of each ECA layer, and the images that they are of.

    Raises:
        ValueError: The model has no ECA.
    """
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    read: list[Path] = []
    for batch in read_images(model, paths, batch_size, unreadable):
        for name, values in gates(model, batch.pixels).items():
            collected[name].append(values.cpu())
        read += batch.paths
    return {name: torch.cat(values) for name, values in collected.items()}, read


def class_means(collected: Mapping[str, torch.Tensor], classes: Sequence[str]) -> ClassMeans:
    """For each layer and each class, an image's folder, the mean gate of each channel, (channels,)."""
    return {
        name: {
            label: values[[i for i, c in enumerate(classes) if c == label]].mean(0) for label in sorted(set(classes))
        } for name, values in collected.items()
    }


def write_gates(folder: Path, collected: Mapping[str, torch.Tensor], read: Sequence[Path]) -> list[Path]:
    """Writes `gates.safetensors`, the gates of each image, and `gates.csv`, the means over each class."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, table = folder / 'gates.safetensors', folder / 'gates.csv'
    contiguous = {name: values.contiguous() for name, values in collected.items()}
    metadata = {'format': 'pt', 'images': '\n'.join(printable(str(path), 4096) for path in read)}
    atomic_write(tensors, lambda new: save_file(contiguous, new, metadata))
    means = class_means(collected, [path.parent.name for path in read])
    atomic_write(table, lambda new: _write_table(new, means))
    return [tensors, table]


def _write_table(path: Path, means: ClassMeans) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        for i, (name, by_class) in enumerate(means.items()):
            if i == 0:
                writer.writerow(['layer', 'channel', *by_class])
            for channel, values in enumerate(zip(*(v.tolist() for v in by_class.values()))):
                writer.writerow([name, channel, *(f'{value:.6f}' for value in values)])


def draw_gates(path: Path, collected: Mapping[str, torch.Tensor], read: Sequence[Path]) -> Path:
    """Draws the mean gate of each channel, a panel for each layer and a line for each class, as the paper does.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # an extra

    means = class_means(collected, [path.parent.name for path in read])
    columns = min(4, len(means))
    rows = -(-len(means) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for panel, (name, by_class) in zip(panels, means.items()):
        for label, values in by_class.items():
            panel.plot(values.tolist(), label=label, linewidth=0.8)
        panel.set_title(name, fontsize=9)
        panel.set_xlim(0, len(values) - 1)
        panel.tick_params(labelsize=7)
    for panel in list(figure.axes)[len(means):]:
        panel.remove()
    figure.supxlabel('channel', fontsize=9)
    figure.supylabel('mean gate', fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 8), fontsize=8)
    atomic_write(path, lambda new: figure.savefig(new, dpi=150))
    return path
