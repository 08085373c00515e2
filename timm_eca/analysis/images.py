"""Image files as a model wants them: the one reader of all commands.

A file is known by its content, not by its name. Images are not turned by their EXIF orientation: timm's datasets don't
turn them either, so that a model sees what it was trained on.
"""
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from timm.utils import natural_key
from torch.utils.data import DataLoader, Dataset

from timm_eca.errors import TimmEcaError, first_line

__all__ = [
    'Attempts', 'ImageError', 'ImageFiles', 'Images', 'find_images', 'has_image_name', 'image_mode', 'name_of',
    'natural_order', 'read_batches', 'read_image', 'read_images', 'to_mode', 'walk_images',
]

# Of photographs. Pillow's readers of other formats, which few people look at, never see a file.
_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'JPEG2000', 'PPM')
_HEIF_NAMES = {'.heic', '.heif', '.hif'}
# What systems and programs leave in folders; so are all names that begin with a dot.
_JUNK = {
    '@eadir', '__pycache__', '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', '#recycle',
    'lost+found', 'system volume information',
}
# What people keep beside images. Any other file is taken for an image, so that none is left out without a word.
_NOT_IMAGES = {
    '.csv', '.html', '.ini', '.json', '.jsonl', '.log', '.md', '.pdf', '.tsv', '.txt', '.xml', '.yaml', '.yml'}


Images = tuple[torch.Tensor, list[Any]]  # a batch, (N, C, H, W), and its labels


class ImageError(TimmEcaError, ValueError):
    """Images that don't exist, or of a kind that can't be read or that the model can't take."""


@cache
def _formats() -> dict[str, str]:
    """The extensions of the formats that this Pillow can read, and its names for these formats."""
    extensions = Image.registered_extensions()
    return {extension: kind for extension, kind in extensions.items() if kind in _FORMATS and kind in Image.OPEN}


def has_image_name(path: Path) -> bool:
    """Whether the extension is that of a format that can be read (HEIC included, whether or not it can be here)."""
    return path.suffix.lower() in _HEIF_NAMES or path.suffix.lower() in _formats()


def natural_order(path: Path) -> tuple[list[Any], str]:
    """A key to sort paths by the numbers in their names, as timm does: `b2` comes before `b10`."""
    return natural_key(path.name), path.name


def walk_images(folder: Path, above: Collection[Path] = ()) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder from this one down with its files that may be images, both in the order that numbers have.

    Links are followed, but not in circles. Hidden files and folders, what systems leave (`Thumbs.db`,
    `__MACOSX`, ...) and texts (`.csv`, `.json`, ...) are left out. Any other file may be an image.

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
        raise ImageError(f'{folder} can\'t be listed ({e.strerror}): make it readable.') from None
    found.sort(key=natural_order)
    folders = [path for path in found if path.is_dir()]
    # A link to nothing counts as a file, so that it is reported.
    yield folder, [
        path for path in found
        if path.suffix.lower() not in _NOT_IMAGES and (path.is_file() or not path.exists())]
    for inner in folders:
        yield from walk_images(inner, {*above, real})


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, and the files below folders that may be images, see `walk_images`.

    Raises:
        ImageError: A path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [file for _, files in walk_images(path) for file in files]
            if not below:
                raise ImageError(f'{path} has no images (.jpg, .png, .webp, ...): name a folder that has.')
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f'{path} does not exist, or is not a file: name images, or folders of them.')
    return found


def read_image(file: str | os.PathLike | IO[bytes], mode: str = 'RGB') -> Image.Image:
    """Reads an image of one of the common formats, and HEIC where pillow-heif is installed.

    Raises:
        ImageError: It is of none of these formats, or its pixels have no known range.
        Exception: It is damaged. Pillow's readers raise many types.
    """
    with open(file, 'rb') if isinstance(file, (str, os.PathLike)) else nullcontext(file) as stream:
        try:
            with Image.open(stream, formats=[*dict.fromkeys(_formats().values())]) as image:
                return to_mode(image, mode)
        except UnidentifiedImageError:
            stream.seek(0)
        with suppress(ImportError):
            import pillow_heif  # its register_heif_opener() would change Pillow for the whole process
            if pillow_heif.is_supported(stream):
                return to_mode(pillow_heif.open_heif(stream).to_pillow(), mode)
    raise ImageError('it is not an image of a common format (JPEG, PNG, WebP, ...; HEIC: pip install pillow-heif)')


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts an image as timm does, and 16-bit grey to the upper 8 bits, as Pillow does with 16-bit colours.

    Raises:
        ImageError: The image has 32-bit or floating-point pixels, whose range no file format says.
    """
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        image = image.convert('I').point(lambda value: value / 256)
    elif image.mode in ('I', 'F'):
        raise ImageError(f'its pixels have 32 bits (mode {image.mode}), of no known range: save it with 8 or 16 bits')
    return image.convert(mode)


def image_mode(channels: int) -> str:
    """Pillow's mode of the images for a model that takes so many channels.

    Raises:
        ImageError: Image files have another number.
    """
    if channels not in (1, 3):
        raise ImageError(f'The model takes {channels} channels, but image files have 1 or 3: choose one of these.')
    return 'L' if channels == 1 else 'RGB'


class ImageFiles(Dataset):
    """Files with a label for each, which are read as images in one of Pillow's modes."""

    def __init__(self, samples: Any, mode: str) -> None:
        self.samples = samples  # (path or open file, label): a list, or a reader of timm's
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.samples[index]
        return read_image(file, self.mode), label


def name_of(dataset: Any, index: int) -> str:
    """The path of an example, or its number in a dataset that has no list of files."""
    samples = getattr(dataset, 'samples', None)
    return os.fspath(samples[index][0]) if isinstance(samples, list) else f'image {index}'


class Attempts(Dataset):
    """The examples of a dataset, transformed, with their labels; of one that can't be read None, and what and why."""

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            image, label = self.dataset[index]
            return self.transform(image), label
        except Exception as e:  # Pillow's readers raise many types for a damaged file
            return None, f'{name_of(self.dataset, index)}: {first_line(e, 200)}'


def read_images(
        model: nn.Module,
        paths: Iterable[Path],
        batch_size: int,
        unreadable: list[str],
) -> Iterator[Images]:
    """Reads image files as `read_batches` does. Their labels are their paths."""
    mode = image_mode(resolve_data_config({}, model=model)['input_size'][0])
    return read_batches(model, ImageFiles([(path, path) for path in paths], mode), batch_size, unreadable)


def read_batches(
        model: nn.Module,
        dataset: Any,
        batch_size: int,
        unreadable: list[str],
        workers: int = 0,
) -> Iterator[Images]:
    """Reads images in batches with the preprocessing of a model's weights, on its device and in its dtype.

    A terminal shows a progress bar.

    Args:
        model: A timm model.
        dataset: Images in the mode that the model takes, and their labels.
        batch_size: Number of images in a batch.
        unreadable: Gets the images that can't be read, and why. They are left out.
        workers: How many processes read.
    """
    transform = create_transform(**resolve_data_config({}, model=model))
    weight = next(model.parameters())
    loader: Any = DataLoader(Attempts(dataset, transform), batch_size, num_workers=workers, collate_fn=list)
    for rows in tqdm(loader, leave=False, disable=None):
        unreadable += [reason for pixels, reason in rows if pixels is None]
        read = [row for row in rows if row[0] is not None]
        if read:
            pixels, labels = zip(*read)
            yield torch.stack(pixels).to(weight.device, weight.dtype), list(labels)
