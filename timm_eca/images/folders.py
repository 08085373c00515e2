"""Finds the splits and the classes in a folder of images."""
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_eca.images.files import natural_order, walk_images
from timm_eca.images.reader import ImageError, has_image_name

__all__ = ['ClassFolders', 'SplitError', 'some']

# Names of splits: train, Training, training_set, train_data, trainset, train2, seg_train, valid, test images, ...
_SPLIT = re.compile(
    r'(?P<prefix>.+[\W_])?(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev|eval(?:uation)?)|'
    r'(?P<test>test(?:ing)?))(?:[\W_]*(?:set|data|images?|imgs?|split|folder))*[\W_]*\d*')
_UNWRITABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')  # control characters, and bytes that are not text


class SplitError(ImageError):
    """It is not clear what the splits are. A caller with other options gives its own fix for the problem."""


def some(names: Sequence[object], count: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ', '.join(map(str, names[:count])) + (f' and {len(names) - count} more' if len(names) > count else '')


def _split_of(name: str, prefix: bool = True) -> str | None:
    """The split that a folder's name stands for: train, validation or test."""
    match = _SPLIT.fullmatch(name.lower())
    return match.lastgroup if match and (prefix or not match['prefix']) else None


class ClassFolders:
    """The files of each class, in natural order, for each split.

    The classes are the innermost folders with images, as in timm. If there is a folder for a split, they are below it.
    Other folders around them don't matter.

    Args:
        path: The folder.
        splits: For each kind of split (`train`, `validation`) the name of its folder, or None to find it. If the first
            has no folder, it is all of `path`.

    Attributes:
        classes: For each split its classes. Empty for a later split without a folder.
        notes: What the user should know.

    Raises:
        SplitError: It is not clear what the splits are.
        ImageError: There are no classes, or it is not clear what they are, or a folder can't be listed.
    """

    def __init__(self, path: Path, splits: Mapping[str, str | None]) -> None:
        self.notes: list[str] = []
        self._files = dict(walk_images(path))
        self._children: dict[Path, list[Path]] = defaultdict(list)
        for folder in self._files:
            if folder != path:  # '.' is its own parent
                self._children[folder.parent].append(folder)
        self._holding = {folder for folder, files in self._files.items() if any(map(has_image_name, files))}
        self._above = {parent for folder in self._holding for parent in (folder, *folder.parents)}

        while True:
            found = [self._find_split(path, kind, name) for kind, name in splits.items()]
            inside = [folder for folder in self._children[path] if folder in self._above]
            if found[0] or path in self._holding or len(inside) != 1 or inside[0] in self._holding:
                break
            path = inside[0]
        for name, place in zip(splits.values(), found):
            if name is not None and place is None:
                names = [folder.name for folder in self._children[path]]
                raise SplitError(
                    f'{path} has no folder {name} with a folder for each class, only {some(names, 5)}',
                    'name another split')
        beside = [folder.name for folder in inside if folder not in found and _split_of(folder.name) is None]
        if found[0] and beside and not any(splits.values()):
            raise SplitError(
                f'{path} has the split {found[0].name}, but also other folders of images ({some(beside)})',
                f'name the splits with --train-split and --val-split, or rename {found[0].name} if it is a class')
        first = self._find_classes(found[0] or path)
        self.classes = [first] + [self._find_classes(place) if place and found[0] else {} for place in found[1:]]
        for place, classes in zip(found[1:], self.classes[1:]):
            strangers = [name for name in classes if name not in first]
            if strangers:
                raise ImageError(
                    f'{place} has {len(strangers)} classes that {found[0]} lacks ({some(strangers)})',
                    'rename or remove the folders, or add images to train on')

    def _find_split(self, path: Path, kind: str, name: str | None) -> Path | None:
        """The folder of a split, by the name given, by its kind, or by another name for this kind."""
        folders = [folder for folder in self._children[path] if self._children[folder]]  # others are classes
        wanted = name or kind
        meaning = _split_of(wanted, prefix=False)
        found = [folder for folder in folders if folder.name.lower() == wanted.lower()] or [
            folder for folder in folders if meaning and _split_of(folder.name) == meaning]
        if len(found) > 1:
            raise SplitError(
                f'{path} has several folders for the split {wanted} ({some([folder.name for folder in found])})',
                'name one with --train-split or --val-split')
        return found[0] if found else None

    def _find_classes(self, path: Path) -> dict[str, list[Path]]:
        """The innermost folders with images, by name, with their files."""
        below = [folder for folder in self._files if folder.is_relative_to(path)]
        folders = {folder for folder in below if folder in self._holding and folder != path}
        if not folders:
            kinds = Counter(file.suffix or file.name for folder in below for file in self._files[folder])
            there = f', but {some([f"{n} {kind}" for kind, n in kinds.most_common()])}' if kinds else ''
            raise ImageError(
                f'{path} has no images in folders of their classes{there}',
                'name a folder with one folder for each class')
        outer = next((parent for folder in folders for parent in folder.parents if parent in folders), None)
        if outer is not None:
            raise ImageError(f'{outer} holds images and also folders of images', 'make one folder for each class')
        unwritable = next((folder for folder in folders if _UNWRITABLE.search(folder.name)), None)
        if unwritable is not None:
            raise ImageError(f'The name of the folder {str(unwritable)!a} is not text', 'rename it')

        places: dict[Path, list[str]] = defaultdict(list)
        for folder in sorted(folders):
            places[folder.parent].append(folder.name)
        seen = some([f'{parent.relative_to(path)}/{{{some(names)}}}' for parent, names in places.items()])
        if len({_split_of(folder.name, prefix=False) for folder in folders} - {None}) > 1:
            raise ImageError(
                f'{path} has images in folders named like splits, not classes ({seen})',
                'make folders by split, and in these by class')
        classes = {folder.name: self._files[folder] for folder in sorted(folders, key=lambda f: natural_order(f.name))}
        if len(classes) < len(folders):
            raise SplitError(
                f'{path} has folders of the same name in several places ({seen})',
                'name one place as the folder, or two with --train-split and --val-split')
        if len(places) > 1:
            self.notes.append(f'the classes of {path} are the innermost folders with images ({seen}).')
        empty = [folder for place in places for folder in self._children[place] if folder not in self._above]
        if empty:
            raise ImageError(
                f'{empty[0]} has no images ({len(empty)} folders like this)', 'remove such folders, or add images')
        strays = [file for folder in below if folder not in folders for file in self._files[folder]]
        if strays:
            self.notes.append(f'{len(strays)} files are in no folder of a class and are left out: {some(strays)}.')
        return classes
