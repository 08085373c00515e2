"""The examples to train and to validate on: the images that can be read, and the split."""
import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_eca.errors import first_line
from timm_eca.images.batches import name_of, read_rows, try_to_read
from timm_eca.images.folders import some
from timm_eca.images.reader import ImageError
from timm_eca.images.sources import Sources, check_labels, labels_of

__all__ = ['Checked', 'Examples', 'list_all', 'read_all', 'split_sources']


class Checked(NamedTuple):
    """What is known of the examples of a dataset."""
    labels: dict[int, Any]  # by index, of the examples that can be read
    unreadable: list[str]  # names and reasons
    digests: dict[int, bytes]  # of the pixels, by index; empty if they were not read


class Examples(Dataset):
    """Some examples of a dataset, with a transform.

    The next example replaces one that can't be read, as in timm's datasets.
    """

    def __init__(self, dataset: Any, labels: dict[int, int]) -> None:
        self.dataset = dataset
        self.labels = labels  # by index
        self.indices = list(labels)
        self.transform: Any = None
        # In shared memory: the processes that read mark what they could not read.
        self.is_skipped = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    @property
    def skipped(self) -> list[str]:
        """The names of the examples that could not be read."""
        return [name_of(self.dataset, self.indices[i]) for i in self.is_skipped.nonzero().flatten().tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for i in chain(range(index, len(self)), range(index)):
            if self.is_skipped[i]:
                continue
            image, label, problem = try_to_read(self.dataset, self.indices[i])
            if problem is None:
                return (image if self.transform is None else self.transform(image)), int(label)
            self.is_skipped[i] = True
        raise ImageError(f'None of {len(self)} images can be read', 'leave out --no-check-images to see why')

    def part(self, indices: Iterable[int]) -> 'Examples':
        """Those of the given indices that are among these examples."""
        return Examples(self.dataset, {index: self.labels[index] for index in indices if index in self.labels})


def read_all(dataset: Any, workers: int = 0) -> Checked:
    """Reads each image of a dataset of images and classes once, with a number of processes."""
    rows = list(chain.from_iterable(read_rows(dataset, _digest, 64, workers, list, 'checking images')))
    return Checked(
        {index: row.label for index, row in enumerate(rows) if row.problem is None},
        [row.problem for row in rows if row.problem is not None],
        {index: row.image for index, row in enumerate(rows) if row.problem is None})


def list_all(dataset: Any) -> Checked:
    """Takes all examples of a dataset as readable, and reads none.

    Raises:
        ImageError: Their classes are not known before they are read.
    """
    labels = labels_of(dataset)
    if labels is None:
        raise ImageError(
            'The classes of a dataset of the Hub are known only after its images were read',
            'leave out --no-check-images')
    return Checked(dict(enumerate(labels)), [], {})


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def split_sources(
        sources: Sources,
        found: Sequence[Checked],
        val_fraction: float = 0.2,
        seed: int = 42,
) -> Sources:
    """Leaves out what can't be read, and splits off images to validate on if there is no split for them.

    The split doesn't depend on what can be read: the same files are split in the same way.

    Args:
        sources: The images.
        found: What `read_all` or `list_all` found in the images to train on, and in those to validate on if there are.
        val_fraction: The part to split off, of each class the same part.
        seed: The seed of that split.

    Raises:
        ImageError: The images that are left can't be trained on.
    """
    name, notes = sources.name, list(sources.notes)
    for labels, unreadable, _ in found:
        if not labels:
            raise ImageError(
                f'{name} has no image that can be read ({some(unreadable, 1)})', 'name a folder with images')
        if unreadable:
            notes.append(
                f'{len(unreadable)} of {len(labels) + len(unreadable)} images can\'t be read and are left out: '
                f'{some(unreadable)}.')
    train = Examples(sources.train, found[0].labels)
    names = sources.class_names or tuple(map(str, range(max(train.labels.values()) + 1)))
    _check_classes(name, names, train.labels.values(), found[0].unreadable)
    if sources.val is not None:
        val = Examples(sources.val, found[1].labels)
        check_labels(name, names, val.labels.values())
    else:
        train, val = _split(name, train, val_fraction, seed)
        _check_classes(f'{name}, without the images to validate on,', names, train.labels.values())
    if not val.labels:
        raise ImageError(f'{name} has no image to validate on that can be read', 'give another --val-fraction')
    missing = sorted(set(range(len(names))) - set(val.labels.values()))
    if missing:
        notes.append(f'{len(missing)} classes have no images to validate on, the first is {names[missing[0]]!r}.')
    first = {digest: index for index, digest in found[0].digests.items() if index in train.labels}
    same = [
        (index, first[digest]) for index, digest in found[-1].digests.items()
        if index in val.labels and digest in first]
    if same:
        one, other = name_of(val.dataset, same[0][0]), name_of(train.dataset, same[0][1])
        notes.append(
            f'{len(same)} of {len(val)} validation images are among the training images ({one} is {other}). This makes '
            'the accuracy too high: remove them.')
    return Sources(name, train, val, names, notes)


def _split(name: str, examples: Examples, val_fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Splits examples by class, to train and to validate on."""
    from sklearn.model_selection import train_test_split  # takes a second to import
    labels = list_all(examples.dataset).labels
    try:
        train, val = train_test_split(
            list(labels), test_size=val_fraction, random_state=seed, stratify=list(labels.values()))
    except ValueError as e:
        raise ImageError(
            f'{name} can\'t be split by class ({first_line(e)})',
            'add images, give another --val-fraction, or make folders train and val') from e
    return examples.part(sorted(train)), examples.part(sorted(val))


def _check_classes(
        name: str, names: Sequence[str], labels: Iterable[int], unreadable: Sequence[str] = ()) -> None:
    check_labels(name, names, labels)
    empty = sorted(set(range(len(names))) - set(labels))
    if empty:
        reasons = f' that can be read ({some(unreadable)})' if unreadable else ''
        raise ImageError(
            f'{name} has no image of the class {names[empty[0]]!r}{reasons} ({len(empty)} classes like this)',
            'add images, or remove such classes')
    if len(names) < 2:
        raise ImageError(f'{name} has one class only, {names[0]!r}', 'make two or more, each in a folder')
