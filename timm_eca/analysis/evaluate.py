"""How well a model classifies images, over all and by class."""
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_eca.analysis.figures import draw_confusion
from timm_eca.analysis.predict import class_names
from timm_eca.analysis.tables import write_csv
from timm_eca.errors import ModelError

__all__ = [
    'CONFUSIONS_FILE', 'MATRIX_FILE', 'MAX_DRAWN', 'Batches', 'ClassScore', 'Evaluation', 'Result', 'classify',
    'match_classes', 'write_confusions', 'write_evaluation',
]

MAX_DRAWN = 100  # classes of a confusion matrix that a reader can see
MATRIX_FILE, CONFUSIONS_FILE = 'confusion_matrix.png', 'confusions.csv'

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # images (N, C, H, W) and their classes (N,)


class Result(NamedTuple):
    """What a model predicts for an image."""
    target: int
    prediction: int
    loss: float  # cross entropy
    in_top5: bool


class ClassScore(NamedTuple):
    """How well a model recognizes a class."""
    name: str
    images: int
    recall: float | None  # percent of its images that are predicted as this class; None without images
    precision: float | None  # percent of the images predicted as this class that are of it; None without such images


@dataclass(frozen=True)
class Evaluation:
    """The results of all images, and the names of all classes."""
    results: Sequence[Result]
    class_names: Sequence[str]

    @property
    def metrics(self) -> dict[str, float]:
        """`loss`, the mean cross entropy, and `top1` in percent of the images. With six classes or more also `top5`."""
        count = len(self.results)
        metrics = {
            'loss': sum(r.loss for r in self.results) / count,
            'top1': 100 * sum(r.target == r.prediction for r in self.results) / count,
        }
        if len(self.class_names) > 5:
            metrics['top5'] = 100 * sum(r.in_top5 for r in self.results) / count
        return metrics

    @property
    def accuracy(self) -> str:
        """The accuracies in words."""
        metrics = self.metrics
        return ', '.join(f'top-{k} {metrics[f"top{k}"]:.2f} %' for k in (1, 5) if f'top{k}' in metrics)

    def confusion_matrix(self) -> torch.Tensor:
        """The number of images for each class (rows) and prediction (columns), int64, (classes, classes)."""
        n = len(self.class_names)
        cells = torch.tensor([r.target * n + r.prediction for r in self.results])
        return torch.bincount(cells, minlength=n * n).view(n, n)

    def by_class(self) -> list[ClassScore]:
        images, taken = Counter(r.target for r in self.results), Counter(r.prediction for r in self.results)
        hits = Counter(r.target for r in self.results if r.target == r.prediction)
        return [
            ClassScore(
                name, images[i], 100 * hits[i] / images[i] if images[i] else None,
                100 * hits[i] / taken[i] if taken[i] else None)
            for i, name in enumerate(self.class_names)
        ]

    def worst_pairs(self, count: int = 20) -> list[tuple[str, str, int]]:
        """The most frequent confusions: a class, the wrong prediction, and the number of images."""
        pairs = Counter((r.target, r.prediction) for r in self.results if r.target != r.prediction)
        worst = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:count]
        return [(self.class_names[target], self.class_names[found], images) for (target, found), images in worst]


def classify(
        model: nn.Module,
        batches: Batches,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Result]:
    """Classifies images on the model's device and in its dtype. Puts the model in eval mode."""
    model.eval()
    weight = next(model.parameters())
    results: list[Result] = []
    with torch.inference_mode():
        for images, targets in batches:
            images, targets = images.to(weight.device, weight.dtype), targets.to(weight.device)
            with autocast():
                logits = model(images)
            logits = logits.float()
            losses = nn.functional.cross_entropy(logits, targets, reduction='none')
            best = logits.topk(min(5, logits.shape[1])).indices
            hits = (best == targets[:, None]).any(1)
            results += map(Result, targets.tolist(), best[:, 0].tolist(), losses.tolist(), hits.tolist())
    return results


def match_classes(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Finds the number that a model has for each class of a dataset, by the classes' names.

    These may be the names in the model's config, ImageNet's (`n01440764`), the names that `timm-eca predict` prints, or
    the numbers themselves. If a model doesn't name its classes, they are in the dataset's order.

    Raises:
        ModelError: The model lacks a class, or has several of its name.
    """
    network: Any = model
    count: int = network.num_classes
    own, numbers, subset = class_names(model), [str(i) for i in range(count)], infer_imagenet_subset(model)
    labels = network.pretrained_cfg.get('label_names')
    known = [own, numbers]
    if isinstance(labels, list | tuple) and len(labels) == count:
        known.insert(0, list(map(str, labels)))
    elif subset:
        known.insert(0, ImageNetInfo(subset).label_names())
    for names_of_classes in (*([one] for one in known), known):  # one kind of names if possible, else a mixture
        index: dict[str, set[int]] = defaultdict(set)
        for i, name in chain.from_iterable(map(enumerate, names_of_classes)):
            index[name].add(i)
        if all(name in index for name in names):
            several = next((name for name in names if len(index[name]) > 1), None)
            if several is not None:
                choices = [{numbers[i]: 0, known[0][i]: 0} for i in sorted(index[several])]
                raise ModelError(
                    f'the model has several classes {several!r}', 'rename the folder to the one that it means: '
                    + '; '.join(' or '.join(name for name in choice if name != several) for choice in choices))
            return [min(index[name]) for name in names]
    if own == numbers and len(names) == count:
        return list(range(count))
    missing = next(name for name in names if name not in own)
    raise ModelError(
        f'the model has no class {missing!r} among its {count} ({", ".join(own[:3])}, ...)',
        'name a model of these classes, or rename the folders')


def write_confusions(path: Path, evaluation: Evaluation) -> None:
    """Writes the most frequent confusions as a table."""
    write_csv(path, [('class', 'predicted', 'images'), *evaluation.worst_pairs()])


def write_evaluation(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Writes `per_class.csv` and `confusions.csv`, and up to 100 classes `confusion_matrix.csv` and `.png`.

    The matrix has a row for each class and a column for each prediction.

    Raises:
        TimmEcaError: matplotlib is not installed. The tables are written.
        OSError: The files can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = evaluation.class_names
    scores = [[f'{cell:.2f}' if isinstance(cell, float) else cell for cell in score] for score in evaluation.by_class()]
    written = [folder / name for name in ('per_class.csv', CONFUSIONS_FILE, 'confusion_matrix.csv', MATRIX_FILE)]
    write_csv(written[0], [ClassScore._fields, *scores])
    write_confusions(written[1], evaluation)
    if len(names) > MAX_DRAWN:
        return written[:2]
    matrix = evaluation.confusion_matrix()
    write_csv(written[2], [['class', *names], *([name, *row] for name, row in zip(names, matrix.tolist()))])
    draw_confusion(written[3], matrix, names)
    return written
