"""The images of a folder or of a dataset by name."""
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from timm_eca.errors import first_line
from timm_eca.images.batches import ImageFiles
from timm_eca.images.folders import SplitError, find_classes
from timm_eca.images.reader import ImageError, image_mode

__all__ = ['Sources', 'is_digits', 'open_sources', 'open_split']


@dataclass(frozen=True)
class Sources:
    """Images to train and to validate on. The labels are numbers of classes."""
    name: str
    train: Any  # `ImageFiles`
    val: Any  # `ImageFiles`, or None: to be split off train
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def fingerprint(self) -> str:
        """A digest of the names of the classes and the files, without their folder. Nothing is read."""
        content: list[Any] = [self.class_names]
        for part in (self.train, self.val):
            content.append([(os.path.basename(part.name(i)), part.labels[i]) for i in range(len(part))] if part else [])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def open_sources(
        data: str,
        dataset_cache: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        in_chans: int = 3,
) -> Sources:
    """Finds images to train and to validate on. It reads none of them.

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
    try:
        return _open(data, {'train': train_split, 'validation': val_split}, dataset_cache, image_mode(in_chans))
    except SplitError as e:
        raise ImageError(e.problem, 'name the splits with --train-split and --val-split') from e


def open_split(
        data: str,
        dataset_cache: str | None = None,
        split: str | None = None,
        in_chans: int = 3,
) -> Sources:
    """Finds images to evaluate on, as `train` of the result. Otherwise like `open_sources`.

    With None, it finds the split to validate on by its name. It takes a folder without splits whole.
    """
    try:
        return _open(data, {'validation': split}, dataset_cache, image_mode(in_chans))
    except SplitError as e:
        raise ImageError(e.problem, 'name the split with --split') from e


def is_digits(data: str) -> bool:
    """Whether a name means scikit-learn's digits. A folder of this name comes first."""
    return data == 'digits' and not os.path.isdir(data)


def _read_digits(mode: str) -> ImageFiles:
    """scikit-learn's 1,797 images of digits, of 8x8 pixels with 17 levels of grey."""
    from sklearn.datasets import load_digits  # of the extra finetune
    digits: Any = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype('uint8')
    return ImageFiles([Image.fromarray(image).convert(mode) for image in pixels], digits.target.tolist(), mode)


def _open(data: str, splits: dict[str, str | None], cache: str | None, mode: str) -> Sources:
    """Opens the first split as `train`, and the second one, if there is one, as `val`."""
    notes = []
    if is_digits(data):
        if len(splits) == 1:
            notes.append('these are all digits. A model that was fine-tuned on them has seen four of five.')
        return Sources(data, _read_digits(mode), None, tuple('0123456789'), tuple(notes))
    if data.startswith('hfds/') and not os.path.isdir(data):
        opened = [_open_hub_dataset(data, name or kind, cache, mode) for kind, name in splits.items()]
        return Sources(data, opened[0][0], opened[1][0] if len(opened) > 1 else None, opened[0][1])
    if not os.path.isdir(data):
        raise ImageError(
            f'{data} is not a folder of images',
            'name an unpacked folder, digits or hfds/NAME, or use timm\'s scripts, as in timm-eca run train.py')
    if data == 'digits':
        notes.append(f'these are the images of the folder {data}, not scikit-learn\'s digits.')
    classes, found = find_classes(Path(data), splits)
    names = tuple(classes[0])
    train, val, *_ = (*(_make_dataset(files, names, mode) for files in classes), None)
    return Sources(Path(data).resolve().name, train, val, names, (*notes, *found))


def _make_dataset(files: dict[str, list[Path]], names: Sequence[str], mode: str) -> ImageFiles | None:
    paths = [str(file) for name in names for file in files.get(name, ())]
    labels = [label for label, name in enumerate(names) for _ in files.get(name, ())]
    return ImageFiles(paths, labels, mode) if paths else None


def _open_hub_dataset(data: str, split: str, cache: str | None, mode: str) -> tuple[ImageFiles, tuple[str, ...]]:
    """A split of a dataset of the Hub, and the names of its classes."""
    try:
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    except ImportError as e:
        raise ImageError(f'{data} needs the package datasets', 'pip install datasets') from e
    try:
        reader = create_dataset(data, root=cache, split=split, is_training=split == 'train').reader
        labels = list(reader.iter_targets())
    except (AttributeError, DatasetsError, KeyError, OSError, ValueError) as e:  # no dataset, split or column
        raise SplitError(f'{data} has no readable split {split!r} ({type(e).__name__}: {first_line(e)})') from e
    names = tuple(sorted(reader.class_to_idx, key=lambda name: reader.class_to_idx[name]))
    wrong = next((label for label in labels if label not in range(len(names))), None)
    if wrong is not None:
        raise ImageError(
            f'{data} has an image with the label {wrong!r}, but it names {len(names)} classes',
            'choose a split and a dataset with named classes')
    return ImageFiles([partial(_open_hub_file, reader, i) for i in range(len(labels))], labels, mode), names


def _open_hub_file(reader: Any, index: int) -> Any:
    return reader[index][0]
