"""The images that a model is fine-tuned on: what there is, what of it can be read, and how it is split."""
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset

from timm_eca.analysis.images import Attempts, ImageFiles, image_mode, name_of
from timm_eca.errors import first_line
from timm_eca.finetune.folders import ClassFolders, DataError, some

__all__ = [
    'Checked', 'DataError', 'Examples', 'Sources', 'check_targets', 'list_all', 'open_sources', 'read_all',
    'split_sources']

DIGITS = 'digits'
# What suits 8x8 grey images of digits: no mirror images, nearly all of the image, no change of grey.
DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 10, 'img_size': 56, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}


class Checked(NamedTuple):
    """What is known of the examples of a dataset."""
    targets: dict[int, Any]  # by index, of those that can be read
    unreadable: list[str]  # what can't be, and why
    digests: dict[int, bytes]  # of the pixels, by index; empty where they were not read


class Examples(Dataset):
    """Some examples of a dataset, with a transform.

    In place of an example that can't be read comes the next one, as in timm's datasets.
    """

    def __init__(self, dataset: Any, targets: dict[int, int]) -> None:
        self.dataset = dataset
        self.targets = targets  # by index
        self.indices = list(targets)
        self.transform: Any = None
        # Those that could not be read, in memory that the processes share that read.
        self.is_skipped = torch.zeros(len(targets), dtype=torch.bool).share_memory_()

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
            try:
                image, target = self.dataset[self.indices[i]]
            except Exception:  # Pillow's readers raise many types for a damaged file
                self.is_skipped[i] = True
                continue
            return (image if self.transform is None else self.transform(image)), int(target)
        raise DataError(f'None of {len(self)} images can be read: leave out --no-check-images to see why.')

    def part(self, indices: Iterable[int]) -> 'Examples':
        return Examples(self.dataset, {index: self.targets[index] for index in indices})


@dataclass(frozen=True)
class Sources:
    """What a model is trained and validated on. The examples are images and class indices."""
    name: str
    train: Any
    val: Any  # None: to be split off train
    class_names: tuple[str, ...]  # empty: not known before all was read
    notes: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """A digest of the names of the classes and of the files of `Examples`, wherever they lie."""
        content: list[Any] = [self.class_names]
        for part in (self.train, self.val):
            content += [(os.path.basename(name_of(part.dataset, i)), int(target)) for i, target in part.targets.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digits(mode: str) -> list[tuple[Image.Image, int]]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels and 17 levels of grey."""
    from sklearn.datasets import load_digits  # takes a second to import
    digits: Any = load_digits()
    images = (digits.images * (255 / 16)).round().astype('uint8')
    return [(Image.fromarray(image).convert(mode), target) for image, target in zip(images, digits.target.tolist())]


def open_sources(
        data: str,
        data_dir: str | None = None,
        train_split: str = 'train',
        val_split: str = 'validation',
        in_chans: int = 3,
) -> Sources:
    """Finds the images of a folder or a name, reading none of them.

    The classes of a folder are its innermost folders with images, as in timm.

    Args:
        data: `digits`, a folder of images by class (or by split and class), or `hfds/NAME`, a dataset of the Hub.
        data_dir: Root or cache of a named dataset.
        train_split: The split to train on.
        val_split: The split to validate on.
        in_chans: The channels that the model takes, 1 or 3.

    Raises:
        DataError: There are no such images, or it is not clear what their classes are.
        ImageError: A folder can't be listed, or images don't have so many channels.
    """
    mode = image_mode(in_chans)
    if data == DIGITS:
        return Sources(DIGITS, _digits(mode), None, tuple('0123456789'))
    if Path(data).is_dir():
        folder = ClassFolders(Path(data), train_split, val_split)
        names = tuple(folder.train)
        train, val = (
            ImageFiles([(str(file), i) for i, name in enumerate(names) for file in files.get(name, ())], mode)
            for files in (folder.train, folder.val))
        return Sources(Path(data).resolve().name, train, val if folder.val else None, names, folder.notes)
    if not data.startswith('hfds/'):
        raise DataError(
            f'{data} is not a folder of images: name an unpacked folder, {DIGITS} or hfds/NAME, or train on others by '
            'timm\'s script, timm-eca run train.py.')

    def create(split: str, is_training: bool) -> ImageFiles:
        try:
            dataset = create_dataset(data, root=data_dir, split=split, is_training=is_training)
        except ImportError as e:
            raise DataError(f'{data} needs {e.name}: pip install {e.name}.') from None
        except Exception as e:  # whatever the Hub's client and the library for datasets have to say
            raise DataError(
                f'{data} has no split {split!r} that can be read ({type(e).__name__}: {first_line(e)}): name its '
                'splits with --train-split and --val-split, and its folder with --data-dir.') from None
        return ImageFiles(dataset.reader, mode)  # the dataset itself takes the next image for one that can't be read

    train, val = create(train_split, True), create(val_split, False)
    index: dict[str, int] = train.samples.class_to_idx
    return Sources(data, train, val, tuple(sorted(index, key=lambda name: index[name])))


def read_all(dataset: Any, workers: int = 0) -> Checked:
    """Reads each image of a dataset of images and classes once, with so many processes."""
    loader: Any = DataLoader(Attempts(dataset, _digest), batch_size=64, num_workers=workers, collate_fn=list)
    rows = [row for batch in tqdm(loader, 'checking images', leave=False, disable=None) for row in batch]
    return Checked(
        {index: target for index, (read, target) in enumerate(rows) if read},
        [reason for read, reason in rows if not read],
        {index: read for index, (read, _) in enumerate(rows) if read})


def list_all(dataset: Any) -> Checked:
    """Takes all examples of a dataset for readable, without reading any.

    Raises:
        DataError: Their classes are not known before they are read.
    """
    samples = getattr(dataset, 'samples', dataset)
    if not isinstance(samples, list):
        raise DataError(
            'The images of a dataset of the Hub have to be read to know their classes: leave out --no-check-images.')
    return Checked({index: target for index, (_, target) in enumerate(samples)}, [], {})


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def split_sources(
        sources: Sources,
        found: Sequence[Checked],
        val_fraction: float = 0.2,
        seed: int = 42,
) -> Sources:
    """Leaves out what can't be read, and splits off what is validated on where there is no split for it.

    Args:
        sources: What there is.
        found: What `read_all` or `list_all` found in train and, where there is one, in val.
        val_fraction: How much to split off, of each class the same part.
        seed: The seed of that split.

    Raises:
        DataError: What is left can't be trained on.
    """
    name, notes = sources.name, list(sources.notes)
    for targets, unreadable, _ in found:
        if not targets:
            raise DataError(f'{name} has no image that can be read ({some(unreadable, 1)}): name a folder that has.')
        if unreadable:
            notes.append(
                f'{len(unreadable)} of {len(targets) + len(unreadable)} images can\'t be read and are left out: '
                f'{some(unreadable)}.')
    train = Examples(sources.train, found[0].targets)
    names = sources.class_names or tuple(map(str, range(max(train.targets.values()) + 1)))
    _check_classes(name, names, train.targets.values(), found[0].unreadable)
    if sources.val is not None:
        val = Examples(sources.val, found[1].targets)
        check_targets(name, names, val.targets.values())
    else:
        train, val = _split(name, train, val_fraction, seed)
        _check_classes(f'{name}, without what is validated on,', names, train.targets.values())
    missing = sorted(set(range(len(names))) - set(val.targets.values()))
    if missing:
        notes.append(f'There are no images of {len(missing)} classes, {names[missing[0]]!r} the first, to validate on.')
    first = {digest: index for index, digest in found[0].digests.items() if index in train.targets}
    same = [
        (index, first[digest]) for index, digest in found[-1].digests.items()
        if index in val.targets and digest in first]
    if same:
        one, other = name_of(val.dataset, same[0][0]), name_of(train.dataset, same[0][1])
        notes.append(
            f'{len(same)} of {len(val)} validation images are among the training images ({one} is {other}), which '
            'makes the accuracy too high: remove them.')
    return Sources(name, train, val, names, notes)


def _split(name: str, examples: Examples, val_fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Splits examples by class: what to train and what to validate on."""
    from sklearn.model_selection import train_test_split  # takes a second to import
    try:
        train, val = train_test_split(
            examples.indices, test_size=val_fraction, random_state=seed, stratify=list(examples.targets.values()))
    except ValueError as e:
        raise DataError(
            f'{name} can\'t be split by class ({first_line(e)}): add images, give another --val-fraction, or make '
            'folders train and val.') from None
    return examples.part(sorted(train)), examples.part(sorted(val))


def check_targets(name: str, class_names: Sequence[str], targets: Iterable[Any]) -> None:
    """Refuses labels that are no classes, such as -1 for images that nobody has labelled.

    Raises:
        DataError: There is such a label.
    """
    wrong = [target for target in targets if target not in range(len(class_names))]
    if wrong:
        raise DataError(
            f'{name} has an image with the label {wrong[0]!r}, but its {len(class_names)} classes are numbered from 0: '
            'choose a split whose images are labelled, or correct the labels.')


def _check_classes(
        name: str, names: Sequence[str], targets: Iterable[int], unreadable: Sequence[str] = ()) -> None:
    check_targets(name, names, targets)
    empty = sorted(set(range(len(names))) - set(targets))
    if empty:
        reasons = f' that can be read ({some(unreadable)})' if unreadable else ''
        raise DataError(
            f'{name} has no image of the class {names[empty[0]]!r}{reasons}, {len(empty)} such: add images, or remove '
            'the class.')
    if len(names) < 2:
        raise DataError(f'{name} has one class only, {names[0]!r}: two or more are needed, each in a folder.')
