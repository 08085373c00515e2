"""What a fine-tuning run leaves to be looked at: a table of the epochs, their curves, and the confusion matrix."""
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ['draw_confusion', 'draw_curves', 'write_metrics']


def write_metrics(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes the rows as CSV, with their names as the header."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f'{value:.6g}' for key, value in row.items()} for row in rows)


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], best: float) -> None:
    """Draws the losses and accuracies over the epochs as PNG, with a line at the epoch that was kept."""
    from matplotlib.figure import Figure  # the figure's own canvas: nothing is changed for the user's plots

    epochs = [row['epoch'] for row in rows]
    figure = Figure(figsize=(10, 4), layout='constrained')
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [row['train_loss'] for row in rows], marker='.', label='training')
    losses.plot(epochs, [row['loss'] for row in rows], marker='.', label='validation')
    losses.set(xlabel='epoch', ylabel='loss')
    accuracies.plot(epochs, [row['top1'] for row in rows], marker='.', label='top-1')
    accuracies.plot(epochs, [row['top5'] for row in rows], marker='.', label='top-5')
    accuracies.set(xlabel='epoch', ylabel='validation accuracy (%)')
    for axes in (losses, accuracies):
        axes.axvline(best, color='grey', linestyle=':', label='kept')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_confusion(path: Path, targets: Sequence[int], predictions: Sequence[int], names: Sequence[str]) -> None:
    """Draws how many images of each class were taken for which, as PNG; with numbers and names up to 30 classes."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = confusion_matrix(targets, predictions, labels=range(len(names)))
    few = len(names) <= 30
    size = 4 + 0.4 * len(names) if few else 10
    figure = Figure(figsize=(size, size), layout='constrained')
    axes = figure.subplots()
    labels = [name.replace('$', r'\$') for name in names]  # no formulas
    display = ConfusionMatrixDisplay(matrix, display_labels=labels if few else None)
    display.plot(
        ax=axes, include_values=few, cmap='Blues', colorbar=not few, xticks_rotation='vertical', values_format='d')
    if not few:
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150)
