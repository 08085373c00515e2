"""The images of a folder or of a dataset by name."""
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from timm_eca.errors import first_line
from timm_eca.images.batches import ImageFiles, name_of
from timm_eca.images.digits import DIGITS, is_digits, read_digits
from timm_eca.images.folders import ClassFolders, SplitError
from timm_eca.images.reader import ImageError, image_mode

__all__ = ['Sources', 'check_labels', 'labels_of', 'open_sources', 'open_split']

_KINDS = 'name an unpacked folder, digits or hfds/NAME, or use timm\'s scripts, as in timm-eca run train.py'


@dataclass(frozen=True)
class Sources:
    """Images to train and to validate on. The examples are images and class indices."""
    name: str
    train: Any
    val: Any  # None: to be split off train
    class_names: tuple[str, ...]  # empty: not known before all images were read
    notes: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """A digest of the names of the classes and the files, without their folder. Nothing is read."""
        content: list[Any] = [self.class_names]
        for part in (self.train, self.val):
            labels = None if part is None else labels_of(part)
            content.append(len(part or ()) if labels is None else [
                (os.path.basename(name_of(part, i)), label) for i, label in enumerate(labels)])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def labels_of(dataset: Any) -> list[int] | None:
    """The labels of a dataset, or None if its images have to be read for them."""
    samples = getattr(dataset, 'samples', dataset)
    return [label for _, label in samples] if isinstance(samples, list) else None


def check_labels(name: str, class_names: Sequence[str], labels: Iterable[Any]) -> None:
    """Refuses labels that are no classes, such as -1 for images without a label.

    Raises:
        ImageError: There is such a label.
    """
    wrong = [label for label in labels if label not in range(len(class_names))]
    if wrong:
        raise ImageError(
            f'{name} has an image with the label {wrong[0]!r}, but its {len(class_names)} classes are numbered from 0',
            'choose a split whose images have labels, or correct the labels')


def open_sources(
        data: str,
        dataset_cache: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        in_chans: int = 3,
) -> Sources:
    """Finds images to train and to validate on. It reads none of them.

    The classes of a folder are its innermost folders with images, as in timm.

    Args:
        data: A folder of images by class (or by split and class), `digits`, or `hfds/NAME`, a dataset of the Hub.
        dataset_cache: Cache of a dataset of the Hub.
        train_split: The split to train on. None finds it by its name.
        val_split: The split to validate on. None finds it by its name.
        in_chans: The channels that the model takes, 1 or 3.

    Raises:
        ImageError: There are no such images, or it is not clear what their classes are.
        ImportError: A package for this data is missing.
    """
    mode = image_mode(in_chans)
    if is_digits(data):
        return Sources(DIGITS, read_digits(mode), None, tuple('0123456789'))
    if os.path.isdir(data):
        return _open_folder(data, {'train': train_split, 'validation': val_split}, mode)
    try:
        train, names = _open_hub_dataset(data, train_split or 'train', dataset_cache, mode)
        val, _ = _open_hub_dataset(data, val_split or 'validation', dataset_cache, mode)
    except SplitError as e:
        raise ImageError(
            e.problem, 'name its splits with --train-split and --val-split, and its cache with --dataset-cache') from e
    return Sources(data, train, val, names)


def open_split(
        data: str,
        dataset_cache: str | None = None,
        split: str | None = None,
        in_chans: int = 3,
) -> Sources:
    """Finds images to evaluate on, as `train` of the result. A folder without splits is taken whole.

    Args:
        data: As in `open_sources`.
        dataset_cache: As in `open_sources`.
        split: The split. None finds the one to validate on by its name.
        in_chans: The channels that the model takes, 1 or 3.

    Raises:
        ImageError: There are no such images, or it is not clear what their classes are.
        ImportError: A package for this data is missing.
    """
    mode = image_mode(in_chans)
    if is_digits(data):
        seen = 'these are all digits: a model that was fine-tuned on them has seen four in five.'
        return replace(open_sources(data, in_chans=in_chans), notes=[seen])
    try:
        if os.path.isdir(data):
            return _open_folder(data, {'validation': split}, mode)
        dataset, names = _open_hub_dataset(data, split or 'validation', dataset_cache, mode)
    except SplitError as e:
        raise ImageError(e.problem, 'name the split with --split') from e
    return Sources(data, dataset, None, names)


def _open_folder(data: str, splits: dict[str, str | None], mode: str) -> Sources:
    """The first split as `train`, and the second, if it is asked for and there, as `val`."""
    folders = ClassFolders(Path(data), splits)
    names = tuple(folders.classes[0])
    train, val, *_ = (*(_files(classes, names, mode) if classes else None for classes in folders.classes), None)
    hidden = [f'these are the images of the folder {data}, not scikit-learn\'s digits.'] if data == DIGITS else []
    return Sources(Path(data).resolve().name, train, val, names, hidden + folders.notes)


def _files(classes: dict[str, list[Path]], names: Sequence[str], mode: str) -> ImageFiles:
    return ImageFiles([(str(file), i) for i, name in enumerate(names) for file in classes.get(name, ())], mode)


def _open_hub_dataset(data: str, split: str, cache: str | None, mode: str) -> tuple[ImageFiles, tuple[str, ...]]:
    """A split of a dataset of the Hub and the names of its classes."""
    if not data.startswith('hfds/'):
        raise ImageError(f'{data} is not a folder of images', _KINDS)
    try:
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    except ImportError as e:
        raise ImageError(f'{data} needs the package datasets', 'pip install datasets') from e
    try:
        dataset = create_dataset(data, root=cache, split=split, is_training=split == 'train')
        index: dict[str, int] = dataset.reader.class_to_idx
    except (AttributeError, DatasetsError, KeyError, OSError, ValueError) as e:  # no dataset, split or column
        raise SplitError(f'{data} has no readable split {split!r} ({type(e).__name__}: {first_line(e)})') from e
    # The reader, since the dataset replaces an image that can't be read by the next one.
    return ImageFiles(dataset.reader, mode), tuple(sorted(index, key=lambda name: index[name]))
