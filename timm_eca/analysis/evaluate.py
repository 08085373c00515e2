"""How well a model classifies images: in all and by class."""
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_eca.analysis.figures import draw_confusion
from timm_eca.analysis.predict import ModelError, class_names
from timm_eca.analysis.tables import write_csv

__all__ = ['Batches', 'ClassScore', 'Evaluation', 'Result', 'classify', 'match_classes', 'write_evaluation']

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # images (N, C, H, W) and their classes (N,)


class Result(NamedTuple):
    """What a model says of an image."""
    target: int
    prediction: int
    loss: float  # cross entropy
    in_top5: bool


class ClassScore(NamedTuple):
    """How well a class is told from the others."""
    name: str
    images: int
    recall: float | None  # percent of its images that are recognized; None without images
    precision: float | None  # percent of the images taken for it that are of it; None where none is


@dataclass(frozen=True)
class Evaluation:
    """The results of all images."""
    results: Sequence[Result]
    class_names: Sequence[str]

    @property
    def metrics(self) -> dict[str, float]:
        """`loss`, the mean cross entropy; `top1` and, of more than five classes, `top5`, percent of the images."""
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
        """The number of images of each class (rows) that were taken for each class (columns), int64."""
        n = len(self.class_names)
        cells = torch.tensor([r.target * n + r.prediction for r in self.results])
        return torch.bincount(cells, minlength=n * n).view(n, n)

    def by_class(self) -> list[ClassScore]:
        matrix = self.confusion_matrix()
        counts = zip(self.class_names, matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist())
        return [
            ClassScore(name, images, 100 * hits / images if images else None, 100 * hits / taken if taken else None)
            for name, hits, images, taken in counts
        ]


def classify(
        model: nn.Module,
        batches: Batches,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Result]:
    """Classifies images, on the model's device and in its dtype; puts the model in eval mode."""
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
    """The number that a model has for each class of a dataset, by the classes' names.

    These may be the names in the model's config, ImageNet's (`n01440764`), those that `timm-eca predict` prints, or
    the numbers themselves. Of a model that doesn't name its classes, they are in the dataset's order.

    Raises:
        ModelError: The model has other classes.
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
    for candidates in known:
        index = {name: i for i, name in enumerate(candidates)}
        if all(name in index for name in names):
            return [index[name] for name in names]
    if own == numbers and len(names) == count:
        return list(range(count))
    missing = next(name for name in names if name not in own)
    raise ModelError(
        f'the model has no class {missing!r} among its {count} ({", ".join(own[:3])}, ...): name a model of these '
        'classes, or rename the folders.')


def write_evaluation(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Writes `per_class.csv`, and `confusion_matrix.csv` and `.png` (rows: classes, columns: what they were taken for).

    Raises:
        TimmEcaError: matplotlib is not installed. The tables are written.
        OSError: They can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix, names = evaluation.confusion_matrix(), evaluation.class_names
    scores = [[f'{cell:.2f}' if isinstance(cell, float) else cell for cell in score] for score in evaluation.by_class()]
    written = [folder / name for name in ('per_class.csv', 'confusion_matrix.csv', 'confusion_matrix.png')]
    write_csv(written[0], [ClassScore._fields, *scores])
    write_csv(written[1], [['class', *names], *([name, *row] for name, row in zip(names, matrix.tolist()))])
    draw_confusion(written[2], matrix, names)
    return written
