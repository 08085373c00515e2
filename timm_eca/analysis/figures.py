"""The figures: channel weights, confusion matrices, and the curves of a training run."""
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from timm_eca.analysis.gates_report import Gates, class_means, is_constant, title_of
from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.atomic import atomic_write

__all__ = ['draw_confusion', 'draw_curves', 'draw_gates']

_MAX_LINES = 3  # classes: more lines hide each other
_MAX_NAMES = 40  # classes: there is no room for more beside a heat map
_LENGTH = 40  # characters of a class's name


@contextmanager
def _figure(path: Path, width: float, height: float, names: Sequence[str] = ()) -> Iterator[tuple[Any, list[str]]]:
    """Yields an empty figure and labels for some names. At the end it writes the figure, whole or not at all.

    The suffix of the path is the format. Labels escape characters that matplotlib's fonts lack.

    Raises:
        TimmEcaError: matplotlib is not installed.
        OSError: The figure can't be written.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
        from matplotlib.figure import Figure  # pyplot would change the user's plots
    except ImportError as e:
        raise TimmEcaError(f'{path.name} needs matplotlib', 'pip install \'timm_eca[plot]\'') from e
    properties = (font_manager.FontProperties(family=[name]) for name in matplotlib.rcParams['font.family'])
    known = {
        chr(code) for font in properties
        for code in font_manager.get_font(font_manager.findfont(font)).get_charmap()}
    labels = [printable(''.join(c if c in known else ascii(c)[1:-1] for c in name), _LENGTH) for name in names]
    counts = Counter(labels)  # long names may have the same beginning
    labels = [label if counts[label] == 1 else f'{i}: {label}' for i, label in enumerate(labels)]
    settings: dict[Any, Any] = {
        'text.usetex': False, 'text.parse_math': False, 'axes.formatter.use_mathtext': False,  # names are no formulas
        'pdf.fonttype': 42,  # TrueType: publishers refuse the default
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout='constrained')
        yield figure, labels
        atomic_write(path, lambda new: figure.savefig(new, dpi=150, bbox_inches='tight'))


def draw_gates(path: Path, collected: Gates, images: Sequence[Path], sort: bool = False) -> None:
    """Draws the mean weight of each channel, a panel for each layer. More than three classes make a heat map.

    All panels have the same scale. It is at least 0.2 wide, so that noise doesn't look like attention.

    Args:
        path: The figure. Its suffix is the format.
        collected: The channel weights of each layer, (images, channels).
        images: The images. Their folders are the classes.
        sort: Sort the channels of each layer by their mean over the classes.
    """
    classes, means = class_means(collected, images)
    low, high = min(m.min().item() for m in means.values()), max(m.max().item() for m in means.values())
    width = min(max(0.2, 1.1 * (high - low)), 1.0)
    low = min(max(0.0, (low + high - width) / 2), 1 - width)
    lines = len(classes) <= _MAX_LINES
    columns = min((2, 3, 4), key=lambda n: (-len(means) % n, abs(n - 3)))  # few empty places
    columns = min(columns, len(means))
    rows = -(-len(means) // columns)
    height = 3.0 if lines else min(max(3.0, 0.2 * len(classes)), 8.0)
    with _figure(path, 4.5 * columns + 2, height * rows + 0.5, classes) as (figure, labels):
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for panel, (name, by_class) in zip(panels, means.items()):
            if sort:
                by_class = by_class[:, by_class.mean(0).argsort()]
            title = title_of(name)
            panel.set_title(f'{title} (constant)' if is_constant(collected[name]) else title, fontsize=12)
            panel.tick_params(labelsize=9)
            if lines:
                panel.plot(by_class.T.numpy(), label=labels, linewidth=0.9)
                panel.set(xlim=(-0.5, by_class.shape[1] - 0.5), ylim=(low, low + width))
            else:
                step = -(-len(classes) // _MAX_NAMES)
                panel.imshow(by_class.numpy(), vmin=low, vmax=low + width, aspect='auto', interpolation='none')
                panel.set_yticks(range(0, len(classes), step), labels[::step], fontsize=9 if len(classes) <= 20 else 6)
        for panel in figure.axes[len(means):]:
            panel.remove()
        figure.supxlabel('channel, sorted by mean weight' if sort else 'channel', fontsize=11)
        if lines:
            figure.supylabel('mean channel weight', fontsize=11)
        else:
            figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label='mean channel weight')
        if lines and len(classes) > 1:
            figure.legend(handles=figure.axes[0].lines, loc='outside right upper', fontsize=10)


def draw_confusion(path: Path, matrix: torch.Tensor, names: Sequence[str]) -> None:
    """Draws a confusion matrix, with the number of images for each class (rows) and prediction (columns).

    It prints these numbers for 30 classes at most.
    """
    count, images = len(names), int(matrix.sum())
    recall = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    accuracy = 100 * matrix.trace().item() / max(images, 1)
    size = max(count * (0.4 if count <= 30 else 0.16), 3)
    with _figure(path, size + 4, size + 3, names) as (figure, labels):
        axes = figure.subplots()
        image = axes.imshow(recall.numpy(), cmap='Blues', vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, shrink=0.8, label='share of the class (diagonal: recall)')
        axes.set(xlabel='predicted class', ylabel='true class')
        axes.set_title(f'Confusion matrix: {images:,} images, {accuracy:.2f} % correct')
        font = 9 if count <= 30 else 6
        axes.set_xticks(range(count), labels, rotation='vertical', fontsize=font)
        axes.set_yticks(range(count), labels, fontsize=font)
        if count <= 30:
            for row, column in matrix.nonzero().tolist():
                axes.text(
                    column, row, str(matrix[row, column].item()), ha='center', va='center', fontsize=8,
                    color='white' if recall[row, column] > 0.5 else 'black')


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], best: float) -> None:
    """Draws losses and accuracies over the epochs.

    Args:
        path: The figure. Its suffix is the format.
        rows: For each epoch `epoch`, `train_loss`, `loss`, `top1` and perhaps `top5`.
        best: The epoch whose weights are kept.
    """
    epochs = [row['epoch'] for row in rows]
    with _figure(path, 10, 4) as (figure, _):
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
