"""Finds the splits and the classes in a folder of images."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_eca.images.files import natural_order, walk_images
from timm_eca.images.reader import ImageError, has_image_name

__all__ = ['SplitError', 'find_classes', 'some']

Tree = dict[Path, list[Path]]  # folders and their files
Classes = dict[str, list[Path]]  # names and their files

# Names of splits: train, Training, training_set, train_data, trainset, train2, seg_train, valid, test images, ...
_SPLIT = re.compile(
    r'(?P<prefix>.+[\W_])?(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev|eval(?:uation)?)|'
    r'(?P<test>test(?:ing)?))(?:[\W_]*(?:set|data|images?|imgs?|split|folder))*[\W_]*\d*')
_UNWRITABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')  # control characters, and bytes that are not text


class SplitError(ImageError):
    """It is not clear what the splits are. It names no fix: the caller knows its own options."""


def some(names: Sequence[object], count: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ', '.join(map(str, names[:count])) + (f' and {len(names) - count} more' if len(names) > count else '')


def _split_of(name: str, prefix: bool = True) -> str | None:
    """The split that a folder's name stands for: train, validation or test."""
    match = _SPLIT.fullmatch(name.lower())
    return match.lastgroup if match and (prefix or not match['prefix']) else None


def find_classes(path: Path, splits: Mapping[str, str | None]) -> tuple[list[Classes], list[str]]:
    """Finds the files of each class, in natural order, for each split.

    The classes are the innermost folders with images, as in timm, below the folder of the split. If the first split has
    no folder, it is all of `path`.

    Args:
        path: The folder.
        splits: For each kind of split (`train`, `validation`) the name of its folder, or None to find it.

    Returns:
        The classes of each split, none for a later split without a folder, and notes for the user.

    Raises:
        SplitError: It is not clear what the splits are.
        ImageError: There are no classes, or it is not clear what they are, or a folder can't be listed.
    """
    tree = dict(walk_images(path))
    holding = {folder for folder, files in tree.items() if any(map(has_image_name, files))}
    path, places = _find_splits(path, tree, holding, splits)
    if places[0] is None:
        places = [path, *(None for _ in places[1:])]
    notes: list[str] = []
    first, *others = [_find_innermost(place, tree, holding, notes) if place else {} for place in places]
    for place, classes in zip(places[1:], others):
        strangers = [name for name in classes if name not in first]
        if strangers:
            raise ImageError(
                f'{place} has {len(strangers)} classes that {places[0]} lacks ({some(strangers)})',
                'rename or remove the folders, or add images to train on')
    return [first, *others], notes


def _find_splits(
        path: Path,
        tree: Tree,
        holding: set[Path],
        splits: Mapping[str, str | None],
) -> tuple[Path, list[Path | None]]:
    """Finds the folder of each split in `path`, or in the only folder in it. Also returns the folder around them."""
    parents = {folder.parent for folder in tree if folder != path}  # '.' is its own parent
    filled = {parent for folder in holding for parent in (folder, *folder.parents)}
    while True:
        children = [folder for folder in tree if folder.parent == path and folder != path]
        candidates = [folder for folder in children if folder in parents]  # the others are classes
        found = [_choose(candidates, path, kind, name) for kind, name in splits.items()]
        inside = [folder for folder in children if folder in filled]
        if found[0] or path in holding or len(inside) != 1 or inside[0] in holding:
            break
        path = inside[0]
    for name, place in zip(splits.values(), found):
        if name is not None and place is None:
            there = some([folder.name for folder in children], 5)
            raise SplitError(f'{path} has no folder {name} with a folder for each class, only {there}')
    beside = [folder.name for folder in inside if folder not in found and _split_of(folder.name) is None]
    if found[0] and beside and not any(splits.values()):
        raise SplitError(f'{path} has the split {found[0].name}, but also other folders of images ({some(beside)})')
    if found[0] is None and 'train' not in splits:
        names = [folder.name for folder in candidates]
        if len(names) > 1 and all(map(_split_of, names)):
            fix = ' or '.join(f'--split {name}' for name in names)
            raise ImageError(f'{path} has no split to validate on', f'add {fix}')
    return path, found


def _choose(folders: Sequence[Path], path: Path, kind: str, name: str | None) -> Path | None:
    """The folder of a split, by the name given, by its kind, or by another name for this kind."""
    wanted = name or kind
    meaning = _split_of(wanted, prefix=False)
    found = [folder for folder in folders if folder.name.lower() == wanted.lower()] or [
        folder for folder in folders if meaning and _split_of(folder.name) == meaning]
    if len(found) > 1:
        raise SplitError(f'{path} has several folders for the split {wanted} ({some([f.name for f in found])})')
    return found[0] if found else None


def _find_innermost(place: Path, tree: Tree, holding: set[Path], notes: list[str]) -> Classes:
    """The innermost folders with images, by name, with their files."""
    below = [folder for folder in tree if folder.is_relative_to(place) and folder != place]
    folders = sorted((folder for folder in below if folder in holding), key=lambda folder: natural_order(folder.name))
    if not folders:
        raise ImageError(
            f'{place} has no images in folders of their classes', 'name a folder with one folder for each class')
    above = {parent for folder in folders for parent in folder.parents}
    for folder in folders:
        if folder in above:
            raise ImageError(f'{folder} holds images and also folders of images', 'make one folder for each class')
        if _UNWRITABLE.search(folder.name):
            raise ImageError(f'The name of the folder {str(folder)!a} is not text', 'rename it')
    seen = some(sorted(str(folder.relative_to(place)) for folder in folders), 5)
    if len({_split_of(folder.name, prefix=False) for folder in folders} - {None}) > 1:
        raise ImageError(
            f'{place} has images in folders named like splits, not classes ({seen})',
            'make folders by split, and in these by class')
    classes = {folder.name: tree[folder] for folder in folders}
    if len(classes) < len(folders):
        raise SplitError(f'{place} has folders of the same name in several places ({seen})')
    around = {folder.parent for folder in folders}
    if len(around) > 1:
        notes.append(f'the classes of {place} are the innermost folders with images ({seen}).')
    empty = [f for f in below if f.parent in around and f not in holding and f not in above]
    if empty:
        raise ImageError(
            f'{empty[0]} has no images ({len(empty)} folders like this)', 'remove such folders, or add images')
    strays = [file for folder in (place, *below) if folder == place or folder not in holding for file in tree[folder]]
    if strays:
        notes.append(f'{len(strays)} files are in no folder of a class and are left out: {some(strays)}.')
    return classes
