"""The figures: channel weights, confusion matrices, and the curves of a training run."""
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from timm_eca.analysis.gates_report import Gates, class_means, is_constant
from timm_eca.errors import TimmEcaError, printable
from timm_eca.weights.atomic import atomic_write

__all__ = ['draw_confusion', 'draw_curves', 'draw_gates']

_MAX_LINES = 8  # classes that can be told apart as lines
_MAX_NAMES = 40  # that there is room for beside a heat map
_LENGTH = 40  # of a class's name, in characters


@contextmanager
def _figure(path: Path, width: float, height: float, names: Sequence[str] = ()) -> Iterator[tuple[Any, list[str]]]:
    """An empty figure, which is written at the end, whole or not at all. The suffix of the path is the format.

    With it come the labels of some names, which it has fonts for. Characters that no font has are escaped.

    Raises:
        TimmEcaError: matplotlib is not installed.
        OSError: It can't be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: nothing changes for the user's plots
    except ImportError:
        raise TimmEcaError(f'{path.name} needs matplotlib: pip install \'timm_eca[plot]\'.') from None
    families, missing = _find_fonts(names)
    labels = [printable(''.join(ascii(c)[1:-1] if c in missing else c for c in name), _LENGTH) for name in names]
    counts = Counter(labels)  # long names may begin alike
    labels = [label if counts[label] == 1 else f'{i}: {label}' for i, label in enumerate(labels)]
    settings: dict[Any, Any] = {
        'font.family': families,
        'text.usetex': False, 'text.parse_math': False, 'axes.formatter.use_mathtext': False,  # names are no formulas
        'pdf.fonttype': 42,  # TrueType: publishers refuse the default
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout='constrained')
        yield figure, labels
        atomic_write(path, lambda new: figure.savefig(new, dpi=150, bbox_inches='tight'))


def _find_fonts(names: Sequence[str]) -> tuple[list[str], set[str]]:
    """The fonts of the user's settings and others that have the characters of some names, and what none of them has."""
    from matplotlib import font_manager, rcParams

    families, missing = list(rcParams['font.family']), set(filter(str.isprintable, ''.join(names)))
    others = {
        font.name for font in font_manager.fontManager.ttflist if font.style == 'normal'
        and font.weight in (400, 'normal') and not font.name.startswith('Last Resort')}  # which has only boxes
    for family in [*families, *sorted(others)]:
        if not missing:
            break
        file = font_manager.findfont(font_manager.FontProperties(family=[family]))
        found = {c for c in missing if ord(c) in font_manager.get_font(file).get_charmap()}
        if found and family not in families:
            families.append(family)
        missing -= found
    return families, missing


def draw_gates(path: Path, collected: Gates, images: Sequence[Path], sort: bool = False) -> None:
    """Draws the mean weight of each channel, a panel for each layer: a line for each class, or a heat map of many.

    All panels have one scale, at least 0.2 wide: noise is not to look like attention.

    Args:
        path: A file; its suffix is the format.
        collected: The channel weights of each layer, (images, channels).
        images: The images, whose folders are the classes.
        sort: Sort the channels of each layer by their mean over the classes.

    Raises:
        TimmEcaError: matplotlib is not installed.
        OSError: It can't be written.
    """
    classes, means = class_means(collected, images)
    low, high = min(m.min().item() for m in means.values()), max(m.max().item() for m in means.values())
    width = min(max(0.2, 1.1 * (high - low)), 1.0)
    low = min(max(0.0, (low + high - width) / 2), 1 - width)
    lines, columns = len(classes) <= _MAX_LINES, min(4, len(means))
    rows = -(-len(means) // columns)
    with _figure(path, 4 * columns + 2, (2.4 if lines else 4) * rows + 0.5, classes) as (figure, labels):
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
                step = -(-len(classes) // _MAX_NAMES)
                panel.imshow(by_class.numpy(), vmin=low, vmax=low + width, aspect='auto')
                panel.set_yticks(range(0, len(classes), step), labels[::step], fontsize=5.5)
        for panel in figure.axes[len(means):]:
            panel.remove()
        figure.supxlabel('channel, sorted by mean weight' if sort else 'channel', fontsize=9)
        if lines:
            figure.supylabel('mean channel weight', fontsize=9)
        else:
            figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label='mean channel weight')
        if lines and len(classes) > 1:
            figure.legend(handles=figure.axes[0].lines, loc='outside right upper', fontsize=8)


def draw_confusion(path: Path, matrix: torch.Tensor, names: Sequence[str]) -> None:
    """Draws which classes are taken for which, with counts up to 30 classes, and names up to 100.

    Args:
        path: A file; its suffix is the format.
        matrix: The number of images of each class (rows) that were taken for each class (columns).
        names: The names of the classes.

    Raises:
        TimmEcaError: matplotlib is not installed.
        OSError: It can't be written.
    """
    count, images = len(names), int(matrix.sum())
    recall = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    accuracy = 100 * matrix.trace().item() / max(images, 1)
    size = max(count * (0.4 if count <= 30 else 0.16 if count <= 100 else 10 / count), 3)
    with _figure(path, size + 4, size + 3, names) as (figure, labels):
        axes = figure.subplots()
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


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], best: float) -> None:
    """Draws losses and accuracies over the epochs.

    Args:
        path: A file; its suffix is the format.
        rows: For each epoch `epoch`, `train_loss`, `loss` and `top1`, with several classes also `top5`.
        best: The epoch that was kept.

    Raises:
        TimmEcaError: matplotlib is not installed.
        OSError: It can't be written.
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
