"""The images to train and to validate on."""
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset

from timm_eca.errors import first_line
from timm_eca.images.batches import Checked, ImageFiles
from timm_eca.images.folders import some
from timm_eca.images.reader import ImageError
from timm_eca.images.sources import Sources

__all__ = ['Examples', 'split_sources']

_logger = logging.getLogger(__name__)


class Examples(Dataset):
    """Images with a transform, to train on. The next image replaces one that can't be read, as in timm's datasets."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images
        self.transform: Any = None  # `create_loader` sets it

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        for i in chain(range(index, len(self)), range(index)):
            attempt = self.images[i]
            if attempt.problem is None:
                return self.transform(attempt.image), attempt.label
            _logger.warning('Skipped %s', attempt.problem)
        raise ImageError(f'None of {len(self)} images can be read', 'leave out --no-check-images to see why')


def split_sources(
        sources: Sources,
        checked: Sequence[Checked],
        val_fraction: float = 0.2,
        seed: int = 42,
) -> Sources:
    """Leaves out what can't be read, and splits off images to validate on if there is no split for them.

    The split doesn't depend on what can be read: the same files are split in the same way.

    Args:
        sources: The images.
        checked: What is known of the images to train on, and of those to validate on if there are any.
        val_fraction: The part of each class to split off.
        seed: The seed of that split.

    Raises:
        ImageError: The images that are left can't be trained on.
    """
    name, names, notes = sources.name, sources.class_names, list(sources.notes)
    if len(names) < 2:
        raise ImageError(f'{name} has one class only, {names[0]!r}', 'make two or more, each in a folder')
    for dataset, (problems, _) in zip((sources.train, sources.val), checked):
        if problems:
            notes.append(
                f'{len(problems)} of {len(dataset)} images can\'t be read and are left out: {_some(problems)}.')
    if sources.val is None:
        indices, val_source = _split(sources, val_fraction, seed), sources.train
    else:
        indices, val_source = (range(len(sources.train)), range(len(sources.val))), sources.val
    found = (checked[0], checked[-1])
    kept = [[i for i in part if i not in problems] for part, (problems, _) in zip(indices, found)]
    train, val = sources.train.part(kept[0]), val_source.part(kept[1])
    if not len(val):
        raise ImageError(f'{name} has no image to validate on that can be read', 'give another --val-fraction')
    untrained, unseen = (sorted(set(range(len(names))) - set(part.labels)) for part in (train, val))
    if untrained:
        reasons = f' that can be read ({_some(checked[0].problems)})' if checked[0].problems else ''
        raise ImageError(
            f'{name} has no image to train on of the class {names[untrained[0]]!r}{reasons}',
            'add images, or remove the class')
    if unseen:
        missing = some([names[i] for i in unseen])
        notes.append(f'{len(unseen)} of {len(names)} classes have no images to validate on: {missing}.')
    first = {found[0].digests.get(i): i for i in kept[0]}
    same = [(i, first[digest]) for i in kept[1] if (digest := found[1].digests.get(i)) and digest in first]
    if same:
        notes.append(
            f'{len(same)} of {len(val)} validation images are among the training images ({val_source.name(same[0][0])} '
            f'is {sources.train.name(same[0][1])}). This makes the accuracy too high: remove them.')
    return replace(sources, train=train, val=val, notes=tuple(notes))


def _some(problems: Mapping[int, str]) -> str:
    return some(list(problems.values()))


def _split(sources: Sources, val_fraction: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Splits the indices by class, to train and to validate on."""
    from sklearn.model_selection import train_test_split  # takes a second to import
    labels = sources.train.labels
    try:
        train, val = train_test_split(range(len(labels)), test_size=val_fraction, random_state=seed, stratify=labels)
    except ValueError as e:
        raise ImageError(
            f'{sources.name} can\'t be split by class ({first_line(e)})',
            'add images, give another --val-fraction, or make folders train and val') from e
    return sorted(train), sorted(val)
