"""The confusion matrix of a classifier as a figure."""
from collections.abc import Sequence
from pathlib import Path

import torch

from timm_eca.analysis.plot_style import plot_style, save_figure

__all__ = ['draw_confusion']


def draw_confusion(path: Path, matrix: torch.Tensor, names: Sequence[str]) -> None:
    """Draws which classes are taken for which: counts up to 30 classes, names up to 100, the worst pairs above.

    Args:
        path: A file; its suffix is the format.
        matrix: The number of images of each class (rows) that were taken for each class (columns).
        names: The names of the classes.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: It can't be written.
    """
    from matplotlib.figure import Figure  # without pyplot: nothing changes for the user's plots

    count, images = len(names), int(matrix.sum())
    recall = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    accuracy = 100 * matrix.trace().item() / max(images, 1)
    cell = 0.4 if count <= 30 else 0.16 if count <= 100 else 10 / count
    size = max(cell * count, 3)
    with plot_style(names) as labels:
        figure = Figure(figsize=(size + (10 if count > 100 else 4), size + 3), layout='constrained')
        axes, *beside = figure.subplots(1, 2 if count > 100 else 1, squeeze=False)[0]
        image = axes.imshow(recall.numpy(), cmap='Blues', vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, shrink=0.8, label='share of the class (diagonal: recall)')
        axes.set(xlabel='predicted class', ylabel='true class')
        axes.set_title(f'Confusion matrix: {images:,} images, {accuracy:.2f} % correct')
        if count <= 100:
            font = 9 if count <= 30 else 6
            axes.set_xticks(range(count), labels, rotation='vertical', fontsize=font)
            axes.set_yticks(range(count), labels, fontsize=font)
        if count <= 30:
            for row, column in matrix.nonzero().tolist():
                axes.text(
                    column, row, str(matrix[row, column].item()), ha='center', va='center', fontsize=8,
                    color='white' if recall[row, column] > 0.5 else 'black')
        for panel in beside:
            errors = (matrix - matrix.diag().diag()).flatten().topk(20)
            wrong = [(i // count, i % count, n) for n, i in zip(*map(torch.Tensor.tolist, errors)) if n]
            panel.barh([f'{labels[t]} as {labels[p]}' for t, p, _ in wrong], [n for *_, n in wrong])
            panel.invert_yaxis()
            panel.set(title='The most frequent errors', xlabel='images')
        save_figure(figure, path)
