"""The images that a model is fine-tuned on: what there is, what of it can be read, and how it is split."""
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import DataLoader, Dataset

from timm_eca.analysis.images import IMAGE_MODES, read_image, to_mode
from timm_eca.errors import first_line
from timm_eca.finetune.folders import ClassFolders, DataError, some

__all__ = ['Checked', 'DataError', 'Examples', 'Sources', 'TrainingData', 'open_sources', 'read_all', 'split_sources']

_logger = logging.getLogger(__name__)

DIGITS = 'digits'
# What suits 8x8 grey images of digits: no mirror images, nearly all of the image, no change of grey.
DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 10, 'img_size': 56, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}
_PREFIXES = ('hfds/', 'torch/')
_STREAMS = ('hfids/', 'tfds/', 'wds/')


@dataclass
class Sources:
    """The datasets of a name or a folder before anything was read: examples are images and class indices."""
    name: str
    train: Dataset
    val: Dataset | None  # None: to be split off train
    class_names: tuple[str, ...] | None  # None: not known before all was read
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
    val_targets: list[int]
    notes: list[str]
    fingerprint: str


class Examples(Dataset):
    """A part of a dataset, with a transform: an image in the mode that the model takes, and its class.

    In place of an example that can't be read comes the next one, as in timm's datasets. `skipped` tells which they
    were, (examples,), bool, in memory that is shared with the processes that read.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], in_chans: int = 3) -> None:
        self.dataset = dataset
        self.indices = indices
        self.mode = IMAGE_MODES[in_chans]
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
                    _logger.warning('%s is skipped: %s', _name(self.dataset, self.indices[i]), first_line(e, 200))
                continue
            return (image if self.transform is None else self.transform(image)), int(target)
        raise DataError(f'None of {len(self)} images can be read: leave out --no-check-images to see why.')


class _ImageFiles(Dataset):
    """Image files and their classes."""

    def __init__(self, samples: Sequence[tuple[str, int]], mode: str) -> None:
        self.samples = samples
        self.targets = [target for _, target in samples]
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return read_image(path, self.mode), target


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
        ImageError: A folder can't be listed.
    """
    if in_chans not in IMAGE_MODES:
        raise DataError(f'The model takes {in_chans} channels: image files have 1 or 3.')
    mode = IMAGE_MODES[in_chans]
    if data == DIGITS:
        return Sources(DIGITS, _Digits(), None, tuple('0123456789'))
    if Path(data).is_dir():
        folder = ClassFolders(Path(data), train_split, val_split)
        names = tuple(folder.train)

        def dataset(files: dict[str, list[Path]]) -> _ImageFiles:
            return _ImageFiles(
                [(str(file), index) for index, name in enumerate(names) for file in files.get(name, ())], mode)

        val = dataset(folder.val) if folder.val else None
        return Sources(Path(data).resolve().name, dataset(folder.train), val, names, notes=folder.notes)
    if Path(data).is_file():
        raise DataError(f'{data} is a file: unpack it, and name the folder.')
    if data.lower().startswith(_STREAMS):
        raise DataError(f'{data} is a stream, which finetune does not take: use timm\'s script, timm-eca run train.py.')
    if not data.lower().startswith(_PREFIXES):
        raise DataError(
            f'{data} is not a folder of images: name one, or {DIGITS}, or a dataset of timm '
            f'({", ".join(f"{prefix}NAME" for prefix in _PREFIXES)}).')

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
    return Sources(data, train, create(val_split, False), tuple(map(str, classes)) or None)


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
        in_chans: int = 3,
) -> TrainingData:
    """Leaves out what can't be read, and splits off what is validated on where there is no split for it.

    Args:
        sources: What there is.
        found: What `read_all` found in train and, where there is one, in val; None where it wasn't read.
        val_fraction: How much to split off, of each class the same part.
        seed: The seed of that split.
        in_chans: The channels that the model takes.

    Raises:
        DataError: What is left can't be trained on.
    """
    name, notes = sources.name, list(sources.notes)

    def readable(dataset: Any, result: Checked | None) -> tuple[Checked, list[int]]:
        if result is None:
            known = getattr(dataset, 'targets', None)
            if known is None:
                raise DataError(f'{name} has to be read to know its classes: leave out --no-check-images.')
            result = Checked([int(target) for target in known], {}, [])
        if result.unreadable:
            reasons = [f'{_name(dataset, index)} ({reason})' for index, reason in result.unreadable.items()]
            notes.append(
                f'{len(reasons)} of {len(result.targets)} images can\'t be read and are left out: {some(reasons)}.')
        kept = [index for index in range(len(result.targets)) if index not in result.unreadable]
        if not kept:
            reason = f' ({_name(dataset, 0)}: {result.unreadable[0]})' if result.unreadable else ''
            raise DataError(f'{name} has no image that can be read{reason}: name a folder that has.')
        return result, kept

    checked, train = readable(sources.train, found[0])
    targets = checked.targets
    names = sources.class_names or tuple(map(str, range(max(targets) + 1)))
    left = {targets[index] for index in train}
    lost = next((index for index in checked.unreadable if targets[index] not in {*left, -1}), None)
    if lost is not None:
        raise DataError(
            f'{name} has no image that can be read of the class {names[targets[lost]]!r} '
            f'({_name(sources.train, lost)}: {checked.unreadable[lost]}): add images, or remove the class.')
    _check_classes(name, names, [targets[index] for index in train])
    if sources.val is not None:
        val_dataset: Any = sources.val
        val_checked, val = readable(val_dataset, found[1] if len(found) > 1 else None)
        _check_targets(name, names, [val_checked.targets[index] for index in val])
    else:
        counts = Counter(targets[index] for index in train)
        single = [index for index in train if counts[targets[index]] == 1]
        if single:
            raise DataError(
                f'{name} has one image only of the class {names[targets[single[0]]]!r} '
                f'({_name(sources.train, single[0])}), {len(single)} such: add images or remove the class, or give '
                'images to validate on in folders train and val.')
        from sklearn.model_selection import train_test_split  # takes a second to import
        try:
            train, val = train_test_split(
                train, test_size=val_fraction, random_state=seed, stratify=[targets[index] for index in train])
        except ValueError as e:
            raise DataError(
                f'{name} can\'t be split by class ({first_line(e)}): add images, give another --val-fraction, or '
                'make folders train and val.') from None
        train, val, val_checked, val_dataset = sorted(train), sorted(val), checked, sources.train
        _check_classes(f'{name}, without what is validated on,', names, [targets[index] for index in train])
        missing = len(names) - len({targets[index] for index in val})
        if missing:
            notes.append(f'No images of {missing} classes are validated on: a higher --val-fraction would take some.')
    if checked.digests and val_checked.digests:
        first = {checked.digests[index]: index for index in reversed(train)}
        same = [(index, first[val_checked.digests[index]]) for index in val if val_checked.digests[index] in first]
        if same:
            notes.append(
                f'{len(same)} of {len(val)} validation images are among the training images '
                f'({_name(val_dataset, same[0][0])} is {_name(sources.train, same[0][1])}), which makes the accuracy '
                'too high: remove them.')
    data = TrainingData(
        name,
        Examples(sources.train, train, in_chans),
        Examples(val_dataset, val, in_chans),
        names,
        [targets[index] for index in train],
        [val_checked.targets[index] for index in val],
        notes,
        _fingerprint(names, (sources.train, train, targets), (val_dataset, val, val_checked.targets)),
    )
    if not checked.digests:  # --no-check-images: whether there is any image is better found out here
        _ = data.train[0], data.val[0]
    return data


def _fingerprint(names: Sequence[str], *parts: tuple[Any, list[int], list[int]]) -> str:
    """What tells these images and classes from others, wherever they lie."""
    content = [list(names), *(
        [[os.path.basename(_name(dataset, index)), targets[index]] for index in indices]
        for dataset, indices, targets in parts)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _name(dataset: Any, index: int) -> str:
    samples = getattr(dataset, 'samples', None)
    return os.fspath(samples[index][0]) if samples else f'number {index}'


def _check_targets(name: str, names: Sequence[str], targets: Sequence[int]) -> None:
    wrong = next((target for target in targets if not 0 <= target < len(names)), None)
    if wrong is not None:
        raise DataError(f'{name} has an example of class {wrong}, but {len(names)} classes: correct its labels.')


def _check_classes(name: str, names: Sequence[str], targets: Sequence[int]) -> None:
    _check_targets(name, names, targets)
    counts = Counter(targets)
    if len(counts) < 2:
        raise DataError(f'{name} has one class only, {names[targets[0]]!r}: two or more are needed, each in a folder.')
    empty = [names[index] for index in range(len(names)) if index not in counts]
    if empty:
        raise DataError(
            f'{name} has no image of the class {empty[0]!r}, {len(empty)} such: add images, or remove the class.')
