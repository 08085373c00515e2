"""How well a model classifies images: in all and by class; and how its channel weights differ over them."""
import csv
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_eca.analysis.confusion import draw_confusion
from timm_eca.analysis.gates import gates
from timm_eca.analysis.predict import ModelError, class_names
from timm_eca.weights.atomic import atomic_write

__all__ = [
    'ClassScore', 'Evaluation', 'Result', 'classify', 'describe_gates', 'gate_statistics', 'match_classes',
    'write_evaluation',
]

CONSTANT = 0.01  # channel weights that differ by less are called constant
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
    def targets(self) -> list[int]:
        return [r.target for r in self.results]

    @property
    def predictions(self) -> list[int]:
        return [r.prediction for r in self.results]

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return sum(r.loss for r in self.results) / len(self.results)

    @property
    def top1(self) -> float:
        """Percent of the images whose class is the most probable one."""
        return 100 * sum(r.target == r.prediction for r in self.results) / len(self.results)

    @property
    def top5(self) -> float | None:
        """Percent of the images whose class is among the five most probable; None where there are only five."""
        if len(self.class_names) <= 5:
            return None
        return 100 * sum(r.in_top5 for r in self.results) / len(self.results)

    @property
    def metrics(self) -> dict[str, float]:
        """`loss`, `top1` and, where there is one, `top5`."""
        metrics = {'loss': self.loss, 'top1': self.top1, 'top5': self.top5}
        return {name: value for name, value in metrics.items() if value is not None}

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
    """Writes `per_class.csv` and `confusion_matrix.csv` (rows: classes, columns: what they were taken for).

    With matplotlib installed also `confusion_matrix.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = [[f'{cell:.2f}' if isinstance(cell, float) else cell for cell in score] for score in evaluation.by_class()]
    matrix = zip(evaluation.class_names, evaluation.confusion_matrix().tolist())
    tables: dict[str, list[Any]] = {
        'per_class.csv': [ClassScore._fields, *scores],
        'confusion_matrix.csv': [['class', *evaluation.class_names], *([name, *row] for name, row in matrix)],
    }
    for name, rows in tables.items():
        atomic_write(folder / name, partial(_write_csv, rows))
    written = [folder / name for name in tables]
    with suppress(ImportError):
        figure = folder / 'confusion_matrix.png'
        draw_confusion(figure, evaluation.targets, evaluation.predictions, evaluation.class_names)
        written.append(figure)
    return written


def _write_csv(rows: Sequence[Sequence[Any]], path: Path) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(rows)


def gate_statistics(model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """Of each ECA layer: number of images, sum, sum of squares, minus the lowest and the highest gate, (5, channels).

    Raises:
        ValueError: The model has no ECA.
    """
    weight = next(model.parameters())
    statistics: dict[str, torch.Tensor] = {}
    for images, _ in batches:
        for name, values in gates(model, images.to(weight.device, weight.dtype)).items():
            x = values.double().cpu()
            new = torch.stack([torch.full_like(x[0], len(x)), x.sum(0), (x * x).sum(0), -x.amin(0), x.amax(0)])
            statistics[name] = _merge(statistics[name], new) if name in statistics else new
    return statistics


def _merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a[:3] + b[:3], torch.maximum(a[3:], b[3:])])


def describe_gates(parts: Sequence[dict[str, torch.Tensor]]) -> str:
    """One or two sentences on what `gate_statistics` found in the parts of a dataset."""
    merged = dict(parts[0])
    for part in parts[1:]:
        merged = {name: _merge(merged[name], part[name]) for name in merged}
    low, high, spreads, constant = 1.0, 0.0, [], []
    for name, (count, total, squares, lowest, highest) in merged.items():
        spreads.append((squares / count - (total / count) ** 2).clamp(min=0).sqrt())
        low, high = min(low, -lowest.max().item()), max(high, highest.max().item())
        if (highest.max() + lowest.max()).item() < CONSTANT:
            constant.append(name)
    text = f'{low:.4f} to {high:.4f}, standard deviation between images {torch.cat(spreads).mean().item():.4f}'
    if not constant:
        return f'{text}. They differ by more than {CONSTANT} in each of the {len(merged)} layers.'
    where = 'all' if len(constant) == len(merged) else f'{len(constant)} of'
    return (
        f'{text}. They are still constant (they differ by less than {CONSTANT}) in {where} {len(merged)} layers: '
        f'the attention has learned nothing there ({", ".join(constant)}).')
