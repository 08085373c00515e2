"""The images that a model is fine-tuned on: what there is, what of it can be read, and how it is split."""
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import DataLoader, Dataset

from timm_eca.analysis.images import ImageFiles, image_mode, name_of, read_image, to_mode
from timm_eca.errors import first_line
from timm_eca.finetune.folders import ClassFolders, DataError, some

__all__ = ['Checked', 'DataError', 'Examples', 'Sources', 'TrainingData', 'open_sources', 'read_all', 'split_sources']

_logger = logging.getLogger(__name__)

DIGITS = 'digits'
# What suits 8x8 grey images of digits: no mirror images, nearly all of the image, no change of grey.
DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 10, 'img_size': 56, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}


@dataclass
class Sources:
    """The datasets of a name or a folder before anything was read: examples are images and class indices."""
    name: str
    train: Dataset
    val: Dataset | None  # None: to be split off train
    class_names: tuple[str, ...] | None  # None: not known before all was read
    mode: str  # of the images, Pillow's name
    notes: list[str] = field(default_factory=list)


class Checked(NamedTuple):
    """What is found by reading a dataset."""
    targets: list[int]
    unreadable: dict[int, str]  # why an example can't be read, by its index
    digests: list[bytes]  # of the pixels; empty for those that can't be read


@dataclass
class TrainingData:
    """What a model is trained and validated on."""
    name: str
    train: 'Examples'
    val: 'Examples'
    class_names: tuple[str, ...]
    train_targets: list[int]
    notes: list[str]
    fingerprint: str  # of the names of the classes and of the files, wherever they lie


class Examples(Dataset):
    """A part of a dataset, with a transform: an image in the mode that the model takes, and its class.

    In place of an example that can't be read comes the next one, as in timm's datasets. `skipped` tells which they
    were, (examples,), bool, in memory that is shared with the processes that read.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], mode: str) -> None:
        self.dataset = dataset
        self.indices = indices
        self.mode = mode
        self.transform: Any = None
        self.skipped = torch.zeros(len(indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for i in chain(range(index, len(self)), range(index)):
            if self.skipped[i]:
                continue
            try:
                image, target = self.dataset[self.indices[i]]
                image = to_mode(image, self.mode)
            except Exception as e:  # Pillow's readers raise many types for a damaged file
                self.skipped[i] = True
                if self.skipped.sum() <= 10:
                    _logger.warning('%s is skipped: %s', name_of(self.dataset, self.indices[i]), first_line(e, 200))
                continue
            return (image if self.transform is None else self.transform(image)), int(target)
        raise DataError(f'None of {len(self)} images can be read: leave out --no-check-images to see why.')


class _Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels and 17 levels of grey."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # takes a second to import
        digits: Any = load_digits()
        self.images = (digits.images * (255 / 16)).round().astype('uint8')
        self.targets: list[int] = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


class _Strict(Dataset):
    """timm's dataset by our reader, raising for an example that can't be read where timm takes the next one."""

    def __init__(self, dataset: ImageDataset, mode: str) -> None:
        self.reader: Any = dataset.reader
        self.mode = mode

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return read_image(file, self.mode), target


class _Check(Dataset):
    """The class of each example of a dataset, what keeps it from being read, and a digest of its pixels."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, str | None, bytes]:
        try:
            image, target = self.dataset[index]
            pixels = repr((image.mode, image.size)).encode() + image.tobytes()
            return int(target), None, hashlib.blake2b(pixels, digest_size=16).digest()
        except Exception as e:  # Pillow's readers raise many types for a damaged file
            targets = getattr(self.dataset, 'targets', None)
            return (-1 if targets is None else int(targets[index])), first_line(e, 200), b''


def open_sources(
        data: str,
        data_dir: str | None = None,
        train_split: str = 'train',
        val_split: str = 'validation',
        in_chans: int = 3,
        download: bool = False,
) -> Sources:
    """Finds the images of a folder or a name, reading none of them.

    The classes of a folder are its innermost folders with images, as in timm.

    Args:
        data: `digits`, a folder of images by class (or by split and class), or a name of a dataset with random access
            that `timm.data.create_dataset` takes (`hfds/...`, `torch/...`).
        data_dir: Root or cache of a named dataset.
        train_split: The split to train on.
        val_split: The split to validate on.
        in_chans: The channels that the model takes, 1 or 3.
        download: Download a named dataset.

    Raises:
        DataError: There are no such images, or it is not clear what their classes are.
        ImageError: A folder can't be listed, or images don't have so many channels.
    """
    mode = image_mode(in_chans)
    if data == DIGITS:
        return Sources(DIGITS, _Digits(), None, tuple('0123456789'), mode)
    if Path(data).is_dir():
        folder = ClassFolders(Path(data), train_split, val_split)
        names = tuple(folder.train)

        def dataset(files: dict[str, list[Path]]) -> ImageFiles:
            return ImageFiles(
                [(str(file), index) for index, name in enumerate(names) for file in files.get(name, ())], mode)

        val = dataset(folder.val) if folder.val else None
        return Sources(Path(data).resolve().name, dataset(folder.train), val, names, mode, folder.notes)
    if not data.lower().startswith(('hfds/', 'torch/')):
        raise DataError(
            f'{data} is not a folder of images: name an unpacked folder, {DIGITS}, hfds/NAME or torch/NAME, or train '
            'on streams with timm\'s script, timm-eca run train.py.')

    def create(split: str, is_training: bool) -> Any:
        try:
            dataset = create_dataset(data, root=data_dir, split=split, is_training=is_training, download=download)
        except (Exception, SystemExit) as e:  # each kind of dataset raises its own
            raise DataError(
                f'{data} has no split {split!r} that can be read ({type(e).__name__}: {first_line(e)}): name its '
                'splits with --train-split and --val-split, and its folder with --data-dir.') from None
        return _Strict(dataset, mode) if isinstance(dataset, ImageDataset) else dataset

    train = create(train_split, True)
    index = getattr(getattr(train, 'reader', None), 'class_to_idx', None) or {}
    classes = getattr(train, 'classes', None) or sorted(index, key=lambda name: index[name])
    return Sources(data, train, create(val_split, False), tuple(map(str, classes)) or None, mode)


def read_all(dataset: Any, workers: int = 0, progress: Any = None) -> Checked:
    """Reads each image of a dataset once.

    Args:
        dataset: Images and classes.
        workers: How many processes read.
        progress: Makes a progress bar of an iterable.
    """
    loader: Any = DataLoader(_Check(dataset), batch_size=64, num_workers=workers, collate_fn=list)
    rows = [row for batch in (progress(loader) if progress else loader) for row in batch]
    return Checked(
        [row[0] for row in rows], {index: row[1] for index, row in enumerate(rows) if row[1] is not None},
        [row[2] for row in rows])


def split_sources(
        sources: Sources,
        found: Sequence[Checked | None],
        val_fraction: float = 0.2,
        seed: int = 42,
) -> TrainingData:
    """Leaves out what can't be read, and splits off what is validated on where there is no split for it.

    Args:
        sources: What there is.
        found: What `read_all` found in train and, where there is one, in val; None where it wasn't read.
        val_fraction: How much to split off, of each class the same part.
        seed: The seed of that split.

    Raises:
        DataError: What is left can't be trained on.
    """
    name, notes, mode = sources.name, list(sources.notes), sources.mode
    train, reasons = _readable(name, notes, sources.train, found[0])
    names = sources.class_names or tuple(map(str, range(max(train.checked.targets) + 1)))
    _check_classes(name, names, train.targets, reasons)
    if sources.val is not None:
        val, _ = _readable(name, notes, sources.val, found[1])
        _check_targets(name, names, val.targets)
    else:
        train, val = _split(name, names, train, val_fraction, seed)
        _check_classes(f'{name}, without what is validated on,', names, train.targets)
    missing = sorted(set(range(len(names))) - set(val.targets))
    if missing:
        notes.append(f'There are no images of {len(missing)} classes, {names[missing[0]]!r} the first, to validate on.')
    if train.checked.digests and val.checked.digests:
        first = {train.checked.digests[index]: index for index in reversed(train.indices)}
        same = [(index, first[x]) for index in val.indices if (x := val.checked.digests[index]) in first]
        if same:
            notes.append(
                f'{len(same)} of {len(val.indices)} validation images are among the training images '
                f'({name_of(val.dataset, same[0][0])} is {name_of(train.dataset, same[0][1])}), which makes the '
                'accuracy too high: remove them.')
    data = TrainingData(
        name, Examples(train.dataset, train.indices, mode), Examples(val.dataset, val.indices, mode), names,
        train.targets, notes, _fingerprint(names, train, val))
    if not train.checked.digests:  # --no-check-images: whether there is any image is better found out here
        _ = data.train[0], data.val[0]
    return data


@dataclass(frozen=True)
class _Part:
    """Some examples of a dataset."""
    dataset: Any
    checked: Checked  # of the whole dataset
    indices: list[int]

    @property
    def targets(self) -> list[int]:
        return [self.checked.targets[index] for index in self.indices]


def _readable(name: str, notes: list[str], dataset: Any, checked: Checked | None) -> tuple[_Part, dict[int, list[str]]]:
    """The examples of a dataset that can be read, and why the others can't, by class."""
    if checked is None:
        known = getattr(dataset, 'targets', None)
        if known is None:
            raise DataError(f'{name} has to be read to know its classes: leave out --no-check-images.')
        checked = Checked([int(target) for target in known], {}, [])
    reasons: dict[int, list[str]] = defaultdict(list)
    for index, reason in checked.unreadable.items():
        reasons[checked.targets[index]].append(f'{name_of(dataset, index)}: {reason}')
    every = [reason for of_class in reasons.values() for reason in of_class]
    kept = [index for index in range(len(checked.targets)) if index not in checked.unreadable]
    if not kept:
        raise DataError(f'{name} has no image that can be read ({some(every, 1)}): name a folder that has.')
    if every:
        notes.append(f'{len(every)} of {len(checked.targets)} images can\'t be read and are left out: {some(every)}.')
    return _Part(dataset, checked, kept), reasons


def _split(name: str, names: Sequence[str], part: _Part, val_fraction: float, seed: int) -> tuple[_Part, _Part]:
    """Splits examples by class: what to train and what to validate on."""
    counts = Counter(part.targets)
    single = [index for index in part.indices if counts[part.checked.targets[index]] == 1]
    if single:
        raise DataError(
            f'{name} has one image only of the class {names[part.checked.targets[single[0]]]!r} '
            f'({name_of(part.dataset, single[0])}), {len(single)} such: add images, remove the class, or make folders '
            'train and val.')
    from sklearn.model_selection import train_test_split  # takes a second to import
    try:
        split = train_test_split(part.indices, test_size=val_fraction, random_state=seed, stratify=part.targets)
    except ValueError as e:
        raise DataError(
            f'{name} can\'t be split by class ({first_line(e)}): add images, give another --val-fraction, or make '
            'folders train and val.') from None
    train, val = (replace(part, indices=sorted(indices)) for indices in split)
    return train, val


def _fingerprint(names: Sequence[str], *parts: _Part) -> str:
    files = [[os.path.basename(name_of(part.dataset, index)) for index in part.indices] for part in parts]
    content = [list(names), *([list(pair) for pair in zip(f, part.targets)] for f, part in zip(files, parts))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _check_targets(name: str, names: Sequence[str], targets: Sequence[int]) -> None:
    wrong = next((target for target in targets if not 0 <= target < len(names)), None)
    if wrong is not None:
        raise DataError(f'{name} has an example of class {wrong}, but {len(names)} classes: correct its labels.')


def _check_classes(
        name: str,
        names: Sequence[str],
        targets: Sequence[int],
        unreadable: Mapping[int, list[str]] = MappingProxyType({}),
) -> None:
    _check_targets(name, names, targets)
    empty = sorted(set(range(len(names))) - set(targets))
    if empty:
        reasons = unreadable.get(empty[0], [])
        raise DataError(
            f'{name} has no {"readable " if reasons else ""}image of the class {names[empty[0]]!r}'
            f'{f" ({some(reasons)})" if reasons else ""}, {len(empty)} such: add images, or remove the class.')
    if len(names) < 2:
        raise DataError(f'{name} has one class only, {names[0]!r}: two or more are needed, each in a folder.')
