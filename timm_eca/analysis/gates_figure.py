"""The paper's figure of channel weights: the means over each class, for any model and images."""
from collections.abc import Sequence
from pathlib import Path

from timm_eca.analysis.gates_report import Gates, class_means, is_constant
from timm_eca.analysis.plot_style import plot_style, save_figure

__all__ = ['draw_gates']

_MAX_LINES = 8  # classes that can be told apart as lines


def draw_gates(path: Path, collected: Gates, images: Sequence[Path], sort: bool = False) -> None:
    """Draws the mean weight of each channel, a panel for each layer, with a line for each class or as a heat map.

    All panels have one scale, at least 0.2 wide: noise is not to look like attention.

    Args:
        path: A file; its suffix is the format.
        collected: The channel weights of each layer, (images, channels).
        images: The images, whose folders are the classes.
        sort: Sort the channels of each layer by their mean over the classes.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: It can't be written.
    """
    from matplotlib.figure import Figure  # without pyplot: nothing changes for the user's plots

    classes, means = class_means(collected, images)
    low, high = min(m.min().item() for m in means.values()), max(m.max().item() for m in means.values())
    width = min(max(0.2, 1.1 * (high - low)), 1.0)
    low = min(max(0.0, (low + high - width) / 2), 1 - width)
    lines, columns = len(classes) <= _MAX_LINES, min(4, len(means))
    rows = -(-len(means) // columns)
    height = 2.4 if lines else max(2.4, min(0.1 * len(classes), 30 / rows))
    step = -(-len(classes) // int(height / 0.08))  # of the names that there is room for
    with plot_style(classes) as labels:
        figure = Figure(figsize=(4 * columns + 2, height * rows + 0.5), layout='constrained')
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for panel, (name, by_class) in zip(panels, means.items()):
            if sort:
                by_class = by_class[:, by_class.mean(0).argsort()]
            panel.set_title(f'{name} (constant)' if is_constant(collected[name]) else name, fontsize=9)
            panel.tick_params(labelsize=7)
            if lines:
                panel.plot(by_class.T.numpy(), label=labels, linewidth=0.8)
                panel.set(xlim=(-0.5, by_class.shape[1] - 0.5), ylim=(low, low + width))
            else:
                panel.imshow(by_class.numpy(), vmin=low, vmax=low + width, aspect='auto')
                panel.set_yticks(range(0, len(classes), step), labels[::step], fontsize=5.5)
        for panel in figure.axes[len(means):]:
            panel.remove()
        figure.supxlabel('channel, sorted by mean weight' if sort else 'channel', fontsize=9)
        if lines:
            figure.supylabel('mean channel weight', fontsize=9)
        else:
            image = figure.axes[0].images[0]
            figure.colorbar(image, ax=figure.axes, shrink=1 / rows, anchor=(0, 1), label='mean channel weight')
        if lines and len(classes) > 1:
            figure.legend(handles=figure.axes[0].lines, loc='outside right upper', fontsize=8)
        save_figure(figure, path)
