"""Finds image files in folders."""
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from timm_eca.images.reader import ImageError

__all__ = ['find_images', 'natural_order', 'walk_images']

# What systems and programs leave in folders. Names that begin with a dot are left out, too.
_JUNK = {
    '@eadir', '__pycache__', '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', '#recycle',
    'lost+found', 'system volume information',
}
# What people keep beside images. Any other file counts as an image, so no image is left out in silence.
_NOT_IMAGES = {
    '.csv', '.html', '.ini', '.json', '.jsonl', '.log', '.md', '.pdf', '.tsv', '.txt', '.xml', '.yaml', '.yml'}


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names by the numbers in them, as timm does: `b2` comes before `b10`.

    timm's own key fails for digits that `int` can't read, as in `12²`.
    """
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def walk_images(folder: Path, above: Collection[Path] = ()) -> Iterator[tuple[Path, list[Path]]]:
    """Yields this folder and each one below it, with the files that may be images, in natural order.

    Links are followed, but not in circles. Hidden files and folders, what systems leave (`Thumbs.db`, `__MACOSX`, ...)
    and texts (`.csv`, `.json`, ...) are left out. Any other file may be an image.

    Args:
        folder: The folder.
        above: The real paths of the folders around it, which are not entered again.

    Raises:
        ImageError: A folder can't be listed.
    """
    real = folder.resolve()
    if real in above:
        return
    try:
        found = [path for path in folder.iterdir() if path.name[0] != '.' and path.name.lower() not in _JUNK]
    except OSError as e:
        raise ImageError(f'{folder} can\'t be listed ({e.strerror})', 'make it readable') from e
    found.sort(key=lambda path: natural_order(path.name))
    # A broken link counts as a file, so that it is reported.
    files = [path for path in found if path.is_file() or not path.exists()]
    yield folder, [path for path in files if path.suffix.lower() not in _NOT_IMAGES]
    for path in found:
        if path.is_dir():
            yield from walk_images(path, {*above, real})


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, and the files below folders that may be images, see `walk_images`.

    Raises:
        ImageError: A path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [file for _, files in walk_images(path) for file in files]
            if not below:
                raise ImageError(f'{path} has no images (.jpg, .png, .webp, ...)', 'name a folder with images')
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f'{path} does not exist, or is not a file', 'name images, or folders of images')
    return found
