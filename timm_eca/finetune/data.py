"""The images that a model is fine-tuned on: what there is, what of it can be read, and how it is split."""
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.utils import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from timm_eca.analysis.images import IMAGE_MODES, image_extensions, open_image
from timm_eca.errors import TimmEcaError, first_line

__all__ = ['DataError', 'Examples', 'Sources', 'TrainingData', 'open_sources', 'read_all', 'split_sources']

DIGITS = 'digits'
# What suits 8x8 grey images of digits: no mirror images, nearly all of the image, no change of grey.
DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 10, 'img_size': 56, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')
_SPLITS = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}
_UNWRITABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')  # control characters, and bytes that are no text


class DataError(TimmEcaError, ValueError):
    """Images that can't be trained on; says what to do about it."""


@dataclass
class Sources:
    """The datasets of a name or a folder before anything was read: examples are images and class indices."""
    name: str
    train: Dataset
    val: Dataset | None  # None: to be split off train
    class_names: tuple[str, ...] | None  # None: not known before all was read
    settings: dict[str, Any] = field(default_factory=dict)  # what suits these images, unless the user says otherwise
    notes: list[str] = field(default_factory=list)


@dataclass
class TrainingData:
    """What a model is trained and validated on."""
    name: str
    train: Dataset
    val: Dataset
    class_names: tuple[str, ...]
    train_targets: list[int] | None  # None for streams
    val_targets: list[int] | None
    settings: dict[str, Any]
    notes: list[str]
    fingerprint: str = 'stream'


class Examples(Dataset):
    """A part of a dataset, with a transform: an image in the mode that the model takes, and its class."""

    def __init__(self, dataset: Any, indices: Sequence[int], in_chans: int = 3) -> None:
        self.dataset = dataset
        self.indices = indices
        self.mode = IMAGE_MODES[in_chans]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[self.indices[index]]
        image = image if image.mode == self.mode else image.convert(self.mode)
        return (image if self.transform is None else self.transform(image)), int(target)


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_extensions()


def _read_image(path: str) -> Image.Image:
    with open_image(path) as image:
        return _convert(image)


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith(('I', 'F')):  # Pillow would make white of what is above 255
        raise ValueError(f'it has more than 8 bits in a channel (mode {image.mode}): scale it to 8')
    return image.convert('RGB')


class _ClassFolders(ImageFolder):
    """A folder of images with a folder for each class, in the order that numbers have."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self._names = list(classes) if classes else [path.name for path in _folders(root)]
        super().__init__(str(root), loader=_read_image, is_valid_file=_is_image, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return self._names, {name: index for index, name in enumerate(self._names)}


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
    """timm's dataset, raising for an example that can't be read where timm takes the next one."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.reader: Any = dataset.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file, open_image(file) as image:
            return _convert(image), target


class _Read(Dataset):
    """The class of each example of a dataset, or what keeps it from being read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            image, target = self.dataset[index]
            image.load()
            return int(target), None
        except Exception as e:  # Pillow's readers raise whatever a damaged file makes them stumble over
            return -1, first_line(e, 200)


def open_sources(
        data: str,
        data_dir: str | None = None,
        train_split: str = 'train',
        val_split: str = 'validation',
        num_classes: int | None = None,
        in_chans: int = 3,
        batch_size: int = 1,
        seed: int = 42,
        download: bool = False,
) -> Sources:
    """Finds the images of a folder or a name, reading none of them.

    Args:
        data: `digits`, a folder or a tar file of images by class (or by split and class), or a name that
            `timm.data.create_dataset` takes (`hfds/...`, `hfids/...`, `tfds/...`, `wds/...`, `torch/...`).
        data_dir: Root or cache of a named dataset.
        train_split: The split to train on.
        val_split: The split to validate on.
        num_classes: How many classes a named dataset has, where it doesn't say so itself.
        in_chans: The channels that the model takes, 1 or 3.
        batch_size: A hint for streams.
        seed: The seed of the order of streams.
        download: Download a named dataset.

    Raises:
        DataError: There are no such images, or their classes don't make sense.
    """
    if in_chans not in IMAGE_MODES:
        raise DataError(f'The model takes {in_chans} channels: image files have 1 or 3.')
    if data == DIGITS:
        return Sources(DIGITS, _Digits(), None, tuple('0123456789'), dict(DIGITS_SETTINGS))
    path = Path(data)
    if path.is_dir():
        sources = _open_folder(path, train_split, val_split)
        count = len(sources.class_names or ())
        if num_classes not in (None, count):
            raise DataError(f'{path} has {count} classes, not {num_classes}: leave out --num-classes.')
        return sources
    is_tar = path.is_file() and path.suffix == '.tar'
    if not is_tar and not data.lower().startswith(_PREFIXES):
        raise DataError(
            f'{data} is neither a folder nor a tar file of images: name one, or {DIGITS}, or a dataset of timm '
            f'({", ".join(f"{prefix}NAME" for prefix in _PREFIXES)}).')

    def create(split: str, is_training: bool) -> Any:
        try:
            return create_dataset(
                '' if is_tar else data, root=str(path) if is_tar else data_dir, split=split, is_training=is_training,
                batch_size=batch_size, seed=seed, download=download, input_img_mode=IMAGE_MODES[in_chans])
        except (Exception, SystemExit) as e:  # each kind of dataset raises its own
            raise DataError(
                f'{data} has no split {split!r} that can be read ({type(e).__name__}: {first_line(e)}): name its '
                'splits with --train-split and --val-split, and its folder with --data-dir.') from None

    train = create(train_split, True)
    val: Any = None if is_tar else create(val_split, False)
    names = _class_names(train, num_classes)
    if isinstance(train, IterableDataset) and names is None:
        raise DataError(f'{data} doesn\'t say what its classes are: give their number with --num-classes.')
    train, val = (_Strict(dataset) if isinstance(dataset, ImageDataset) else dataset for dataset in (train, val))
    return Sources(path.name if is_tar else data, train, val, names)


def _folders(path: Path) -> list[Path]:
    return sorted(
        (entry for entry in path.iterdir() if not entry.name.startswith('.') and entry.is_dir()),
        key=lambda entry: natural_key(entry.name))


def _open_folder(path: Path, train_split: str, val_split: str) -> Sources:
    folders = {folder.name.lower(): folder for folder in _folders(path)}

    def find(split: str) -> Path | None:
        candidates = (folders.get(name.lower()) for name in (split, *_SPLITS.get(split, ())))
        folder = next((folder for folder in candidates if folder is not None and _folders(folder)), None)
        if folder is None and split not in ('train', 'validation'):
            raise DataError(f'{path} has no folder {split} with a folder for each class: name another split.')
        return folder

    name = path.resolve().name
    notes: list[str] = []
    train_folder, val_folder = find(train_split), find(val_split)
    if train_folder is None:
        train_folder, val_folder = path, None  # one tree
        split = next((name for names in _SPLITS.values() for name in names if name in folders), None)
        if split and all(_folders(folder) and not any(folder.glob('*.*')) for folder in folders.values()):
            raise DataError(
                f'{path} has a split {folders[split].name!r}, but none to train on: name it with --train-split.')
    train = _ClassFolders(train_folder) if _folders(train_folder) else None
    if train is None or not train.samples:
        raise DataError(
            f'{train_folder} has no images in folders of their classes: name a folder with one folder for each class.')
    unwritable = next((name for name in train.classes if _UNWRITABLE.search(name)), None)
    if unwritable is not None:
        raise DataError(f'{train_folder} has a folder {unwritable!a}, whose name is no text: rename it.')
    if len(train.classes) < 2:
        raise DataError(
            f'{train_folder} has one class only, {train.classes[0]!r}: name a folder with two folders or more, one for '
            'each class.')
    empty = sorted(set(range(len(train.classes))) - set(train.targets))
    if empty:
        raise DataError(
            f'{train_folder / train.classes[empty[0]]} has no images, {len(empty)} such: remove the empty folders, or '
            'add images.')
    if val_folder is None:
        return Sources(name, train, None, tuple(train.classes), notes=notes)
    strangers = [folder.name for folder in _folders(val_folder) if folder.name not in train.classes]
    if strangers:
        raise DataError(
            f'{val_folder} has the class {strangers[0]!r}, {len(strangers)} such, that {train_folder} lacks: rename or '
            'remove the folder, or add images to train on.')
    val = _ClassFolders(val_folder, train.classes)
    if not val.samples:
        raise DataError(f'{val_folder} has no images: add some, or remove it and have {train_folder.name} split.')
    missing = sorted(set(range(len(train.classes))) - set(val.targets))
    if missing:
        notes.append(f'{val_folder} has no images of {len(missing)} classes, {train.classes[missing[0]]!r} the first.')
    return Sources(name, train, val, tuple(train.classes), notes=notes)


def _class_names(dataset: Any, num_classes: int | None) -> tuple[str, ...] | None:
    names = getattr(dataset, 'classes', None)
    if names is None:
        index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
        names = sorted(index, key=index.get) if index else None
    if num_classes is not None and (names is None or len(names) != num_classes):
        return tuple(map(str, range(num_classes)))
    return tuple(map(str, names)) if names else None


def read_all(dataset: Any, workers: int = 0, progress: Any = None) -> tuple[list[int], dict[int, str]]:
    """Reads each image of a dataset once.

    Args:
        dataset: Images and classes.
        workers: How many processes read.
        progress: Makes a progress bar of an iterable.

    Returns:
        The class of each example, and what keeps those from being read that can't be, by their index.
    """
    loader: Any = DataLoader(_Read(dataset), batch_size=64, num_workers=workers, collate_fn=list)
    targets: list[int] = []
    unreadable: dict[int, str] = {}
    for batch in progress(loader) if progress else loader:
        for target, reason in batch:
            if reason is not None:
                unreadable[len(targets)] = reason
            targets.append(target)
    return targets, unreadable


def split_sources(
        sources: Sources,
        found: Sequence[tuple[list[int], dict[int, str]] | None],
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
    if isinstance(sources.train, IterableDataset):
        assert sources.val is not None
        assert sources.class_names is not None
        return TrainingData(
            sources.name, sources.train, sources.val, sources.class_names, None, None, sources.settings, sources.notes)
    notes = list(sources.notes)

    def readable(dataset: Any, result: tuple[list[int], dict[int, str]] | None) -> tuple[list[int], list[int]]:
        targets, unreadable = result or ([int(t) for t in getattr(dataset, 'targets', None) or ()], {})
        if not targets:
            raise DataError(f'{sources.name} has to be read to know its classes: leave out --no-check-images.')
        if unreadable:
            named = [f'{_name(dataset, index)} ({reason})' for index, reason in list(unreadable.items())[:3]]
            more = f' and {len(unreadable) - 3} more' if len(unreadable) > 3 else ''
            notes.append(
                f'{len(unreadable)} of {len(targets)} images can\'t be read and are left out: '
                f'{"; ".join(named)}{more}.')
        return targets, [index for index in range(len(targets)) if index not in unreadable]

    targets, train = readable(sources.train, found[0])
    if not train:
        raise DataError(f'{sources.name} has no image that can be read: name a folder that has.')
    names = sources.class_names or tuple(map(str, range(max(targets) + 1)))
    _check_classes(sources.name, names, [targets[index] for index in train])
    if sources.val is not None:
        val_targets, val = readable(sources.val, found[1] if len(found) > 1 else None)
        if not val:
            raise DataError(f'{sources.name} has no image to validate on that can be read: add some.')
        _check_targets(sources.name, names, [val_targets[index] for index in val])
        val_dataset = sources.val
    else:
        from sklearn.model_selection import train_test_split  # takes a second to import
        try:
            train, val = train_test_split(
                train, test_size=val_fraction, random_state=seed, stratify=[targets[index] for index in train])
        except ValueError as e:
            raise DataError(
                f'{sources.name} can\'t be split by class ({first_line(e)}): add images, give --val-fraction, or make '
                'folders train and val.') from None
        train, val, val_targets, val_dataset = sorted(train), sorted(val), targets, sources.train
        _check_classes(f'{sources.name}, without what is validated on,', names, [targets[index] for index in train])
        missing = len(names) - len({targets[index] for index in val})
        if missing:
            notes.append(f'No images of {missing} classes are validated on: a higher --val-fraction would take some.')
    return TrainingData(
        sources.name,
        Examples(sources.train, train, in_chans),
        Examples(val_dataset, val, in_chans),
        names,
        [targets[index] for index in train],
        [val_targets[index] for index in val],
        sources.settings,
        notes,
        _fingerprint(names, (sources.train, train, targets), (val_dataset, val, val_targets)),
    )


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
        raise DataError(f'{name} has an example of class {wrong}, but {len(names)} classes: give --num-classes.')


def _check_classes(name: str, names: Sequence[str], targets: Sequence[int]) -> None:
    _check_targets(name, names, targets)
    counts = Counter(targets)
    if len(counts) < 2:
        raise DataError(f'{name} has one class only, {names[targets[0]]!r}: two or more are needed.')
    empty = [names[index] for index in range(len(names)) if index not in counts]
    if empty:
        raise DataError(
            f'{name} has no image that can be read of the class {empty[0]!r}, {len(empty)} such: add images, or remove '
            'the class.')
