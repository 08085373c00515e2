"""Finds the splits and the classes in a folder of images."""
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from timm_eca.analysis.images import has_image_name, natural_order, walk_images
from timm_eca.errors import TimmEcaError

__all__ = ['ClassFolders', 'DataError', 'some']

# Names of splits: train, Training, training_set, train_data, trainset, train2, seg_train, valid, test images, ...
_SPLIT = re.compile(
    r'(?P<prefix>.+[\W_])?(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev|eval(?:uation)?)|'
    r'(?P<test>test(?:ing)?))(?:[\W_]*(?:set|data|images?|imgs?|split|folder))*[\W_]*\d*')
_UNWRITABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')  # control characters, and bytes that are not text


class DataError(TimmEcaError, ValueError):
    """Images that can't be trained on; says what to do about it."""


def some(names: Sequence[object], count: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ', '.join(map(str, names[:count])) + (f' and {len(names) - count} more' if len(names) > count else '')


def _split_of(name: str, prefix: bool = True) -> str | None:
    """The split that a folder's name stands for: train, validation or test."""
    match = _SPLIT.fullmatch(name.lower())
    return match.lastgroup if match and (prefix or not match['prefix']) else None


class ClassFolders:
    """The files of each class, in the order of `natural_order`, to train on and to validate on.

    The classes are the innermost folders with images, as in timm, below a folder for each split where there are such.
    Folders around them don't matter.

    Args:
        path: The folder.
        train_split: The split to train on.
        val_split: The split to validate on.

    Raises:
        DataError: There are no classes, or it is not clear what they are.
        ImageError: A folder can't be listed.
    """

    def __init__(self, path: Path, train_split: str = 'train', val_split: str = 'validation') -> None:
        self.notes: list[str] = []
        self._files = dict(walk_images(path))
        self._children: dict[Path, list[Path]] = defaultdict(list)
        for folder in self._files:
            if folder != path:  # '.' is its own parent
                self._children[folder.parent].append(folder)
        self._holding = {folder for folder, files in self._files.items() if any(map(has_image_name, files))}
        self._above = {parent for folder in self._holding for parent in (folder, *folder.parents)}

        while True:
            train, val = self._find_split(path, train_split), self._find_split(path, val_split)
            inside = [folder for folder in self._children[path] if folder in self._above]
            if train or path in self._holding or len(inside) != 1 or inside[0] in self._holding:
                break
            path = inside[0]
        for split, found in ((train_split, train), (val_split, val)):
            if found is None and split not in ('train', 'validation'):
                names = [folder.name for folder in self._children[path]]
                raise DataError(
                    f'{path} has no folder {split} with a folder for each class, it has {some(names, 5)}: '
                    'name another split.')
        self.train = self._find_classes(train or path)
        self.val = self._find_classes(val) if train and val else {}  # empty: to be split off train
        strangers = [name for name in self.val if name not in self.train]
        if strangers:
            raise DataError(
                f'{val} has {len(strangers)} classes that {train} lacks ({some(strangers)}): rename or remove the '
                'folders, or add images to train on.')

    def _find_split(self, path: Path, split: str) -> Path | None:
        """The folder of a split, by its name or another that means the same."""
        kind = _split_of(split, prefix=False)
        folders = [folder for folder in self._children[path] if self._children[folder]]  # others are classes
        found = [folder for folder in folders if folder.name.lower() == split.lower()] or [
            folder for folder in folders if kind and _split_of(folder.name) == kind]
        if len(found) > 1:
            raise DataError(
                f'{path} has several folders for the split {split} ({some([folder.name for folder in found])}): name '
                'one with --train-split or --val-split.')
        return found[0] if found else None

    def _find_classes(self, path: Path) -> dict[str, list[Path]]:
        """The innermost folders with images, by name, with their files."""
        below = [folder for folder in self._files if folder.is_relative_to(path)]
        folders = {folder for folder in below if folder in self._holding and folder != path}
        if not folders:
            kinds = Counter(file.suffix or file.name for folder in below for file in self._files[folder])
            there = f', but {some([f"{n} {kind}" for kind, n in kinds.most_common()])}' if kinds else ''
            raise DataError(
                f'{path} has no images in folders of their classes{there}: name a folder with one folder for each '
                'class.')
        outer = next((parent for folder in folders for parent in folder.parents if parent in folders), None)
        if outer is not None:
            raise DataError(f'{outer} holds images and folders of images, too: make one folder for each class.')
        unwritable = next((folder for folder in folders if _UNWRITABLE.search(folder.name)), None)
        if unwritable is not None:
            raise DataError(f'The name of the folder {str(unwritable)!a} is not text: rename it.')

        places: dict[Path, list[str]] = defaultdict(list)
        for folder in sorted(folders):
            places[folder.parent].append(folder.name)
        seen = some([f'{parent.relative_to(path)}/{{{some(names)}}}' for parent, names in places.items()])
        if len({_split_of(folder.name, prefix=False) for folder in folders} - {None}) > 1:
            raise DataError(
                f'{path} has images in folders named like splits, not classes ({seen}): make folders by split, and in '
                'these by class.')
        classes = {folder.name: self._files[folder] for folder in sorted(folders, key=natural_order)}
        if len(classes) < len(folders):
            raise DataError(
                f'{path} has folders of the same name in several places ({seen}): name one place as the folder, or '
                'two with --train-split and --val-split.')
        if len(places) > 1:
            self.notes.append(f'the classes of {path} are the innermost folders with images ({seen}).')
        empty = [folder for place in places for folder in self._children[place] if folder not in self._above]
        if empty:
            raise DataError(
                f'{empty[0]} has no images, {len(empty)} such: remove the folders without images, or add some.')
        strays = [file for folder in below if folder not in folders for file in self._files[folder]]
        if strays:
            self.notes.append(f'{len(strays)} files are in no folder of a class and are left out: {some(strays)}.')
        return classes
