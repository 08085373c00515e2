"""The curves of a fine-tuning run as a figure."""
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_eca.analysis.plot_style import plot_style, save_figure

__all__ = ['draw_curves']


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], best: float) -> None:
    """Draws losses and accuracies over the epochs.

    Args:
        path: A file; its suffix is the format.
        rows: For each epoch `epoch`, `train_loss`, `loss` and `top1`, with several classes also `top5`.
        best: The epoch that was kept.
    """
    from matplotlib.figure import Figure  # without pyplot: nothing changes for the user's plots

    epochs = [row['epoch'] for row in rows]
    with plot_style():
        figure = Figure(figsize=(10, 4), layout='constrained')
        losses, accuracies = figure.subplots(1, 2)
        for axes, column, label in (
                (losses, 'train_loss', 'training'), (losses, 'loss', 'validation'), (accuracies, 'top1', 'top-1'),
                (accuracies, 'top5', 'top-5')):
            if column in rows[0]:
                axes.plot(epochs, [row[column] for row in rows], marker='.', label=label)
        losses.set(xlabel='epoch', ylabel='loss')
        accuracies.set(xlabel='epoch', ylabel='validation accuracy (%)')
        for axes in (losses, accuracies):
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.axvline(best, color='grey', linestyle=':', label='kept')
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
        save_figure(figure, path)
