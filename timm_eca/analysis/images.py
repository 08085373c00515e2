"""Image files as a model wants them: the one reader of all commands.

A file is known by its content, not by its name. Images are not turned by their EXIF orientation: timm's datasets don't
turn them either, so that a model sees what it was trained on.
"""
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn as nn
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from timm_eca.errors import TimmEcaError, first_line

__all__ = [
    'ImageError', 'ImageFiles', 'Images', 'find_images', 'has_image_name', 'image_mode', 'name_of', 'natural_order',
    'read_batches', 'read_image', 'read_images', 'to_mode', 'walk_images',
]


_MODES = {1: 'L', 3: 'RGB'}  # Pillow's names, by the channels that a model takes
# What systems and programs leave in folders; so are all names that begin with a dot.
_JUNK = {
    '@eadir', '__pycache__', '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', '#recycle',
    'lost+found', 'system volume information',
}
# What people keep beside images. Any other file is taken for an image, so that none is left out without a word.
_NOT_IMAGES = {
    '.csv', '.html', '.ini', '.json', '.jsonl', '.log', '.md', '.pdf', '.tsv', '.txt', '.xml', '.yaml', '.yml'}
_HEIF_NAMES = {'.heic', '.heif', '.hif'}
_HEIF_BRANDS = {b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1'}


class ImageError(TimmEcaError, ValueError):
    """Images that don't exist, or of a kind that can't be read or that the model can't take."""


class Images(NamedTuple):
    """A batch."""
    pixels: torch.Tensor  # (N, C, H, W)
    labels: list[Any]


@cache
def _formats() -> tuple[str, ...]:
    """The formats of photographs. Pillow's readers of other formats, which few people look at, never see a file."""
    Image.init()
    common = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'JPEG2000', 'PPM')
    return tuple(kind for kind in common if kind in Image.OPEN)


@cache
def _image_extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(extension for extension, kind in known.items() if kind in _formats()) | _HEIF_NAMES


def has_image_name(path: Path) -> bool:
    """Whether the extension is that of a format that can be read (HEIC included, whether or not it can be here)."""
    return path.suffix.lower() in _image_extensions()


def natural_order(name: str) -> tuple[list[str], str]:
    """A key to sort names by the numbers in them, as timm does: `b2` comes before `b10`."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())], name


def walk_images(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder from this one down with its files that may be images, both in the order that numbers have.

    Links are followed, but not in circles. Hidden files and folders, what systems leave (`Thumbs.db`,
    `__MACOSX`, ...) and texts (`.csv`, `.json`, ...) are left out. Any other file may be an image.

    Raises:
        ImageError: A folder can't be listed.
    """
    def walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[Path, list[Path]]]:
        real = os.path.realpath(folder)
        if real in above:
            return
        try:
            with os.scandir(folder) as found:
                entries = [x for x in found if not x.name.startswith('.') and x.name.lower() not in _JUNK]
        except OSError as e:
            raise ImageError(f'{folder} can\'t be listed ({e.strerror}): make it readable.') from None
        entries.sort(key=lambda x: natural_order(x.name))
        # A link to nothing counts as a file, so that it is reported.
        yield Path(folder), [
            Path(x.path) for x in entries if os.path.splitext(x.name)[1].lower() not in _NOT_IMAGES
            and (x.is_file() or not os.path.exists(x.path))]
        for x in entries:
            if x.is_dir():
                yield from walk(x.path, (*above, real))

    return walk(os.fspath(folder), ())


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
            with Image.open(stream, formats=_formats()) as image:
                return to_mode(image, mode)
        except UnidentifiedImageError:
            stream.seek(0)
            start = stream.read(12)
        if start[4:8] != b'ftyp' or start[8:] not in _HEIF_BRANDS:
            raise ImageError('it is not an image of a common format (JPEG, PNG, WebP, ...)')
        try:
            import pillow_heif  # its register_heif_opener() would change Pillow for the whole process
        except ImportError:
            raise ImageError('HEIC needs pillow-heif: pip install pillow-heif') from None
        stream.seek(0)
        return to_mode(pillow_heif.open_heif(stream).to_pillow(), mode)


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


class ImageFiles(Dataset):
    """Image files with a label for each, which are read in one of Pillow's modes."""

    def __init__(self, samples: Sequence[tuple[str | Path, Any]], mode: str) -> None:
        self.samples = samples
        self.targets = [label for _, label in samples]
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        path, label = self.samples[index]
        return read_image(path, self.mode), label


class _Preprocessed(Dataset):
    """The examples of a dataset, preprocessed; of those that can't be read None, and what and why."""

    def __init__(self, dataset: Any, transform: Any, mode: str) -> None:
        self.dataset, self.transform, self.mode = dataset, transform, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, Any]:
        try:
            image, label = self.dataset[index]
            return self.transform(to_mode(image, self.mode)), label
        except Exception as e:  # Pillow's readers raise many types for a damaged file
            return None, (Path(name_of(self.dataset, index)), first_line(e, 200))


def name_of(dataset: Any, index: int) -> str:
    """The path of an example, or its number in a dataset that has no files."""
    samples = getattr(dataset, 'samples', None)
    return os.fspath(samples[index][0]) if samples else f'image {index}'


def image_mode(channels: int) -> str:
    """Pillow's mode of the images for a model that takes so many channels.

    Raises:
        ImageError: Image files have another number.
    """
    if channels not in _MODES:
        raise ImageError(f'The model takes {channels} channels, but image files have 1 or 3: choose one of these.')
    return _MODES[channels]


def read_images(
        model: nn.Module,
        paths: Iterable[Path],
        batch_size: int,
        unreadable: list[tuple[Path, str]],
) -> Iterator[Images]:
    """Reads image files as `read_batches` does. Their labels are their paths."""
    mode = image_mode(resolve_data_config({}, model=model)['input_size'][0])
    files = ImageFiles([(path, path) for path in paths], mode)
    return read_batches(model, files, batch_size, unreadable)


def read_batches(
        model: nn.Module,
        dataset: Any,
        batch_size: int,
        unreadable: list[tuple[Path, str]],
        workers: int = 0,
) -> Iterator[Images]:
    """Reads images in batches with the preprocessing of a model's weights, on its device and in its dtype.

    Args:
        model: A timm model.
        dataset: Images and their labels.
        batch_size: Number of images in a batch.
        unreadable: Gets each image that can't be read, and why. It is left out.
        workers: How many processes read.

    Raises:
        ImageError: The model takes neither grey nor colour images, or its config has no valid preprocessing.
    """
    cfg = resolve_data_config({}, model=model)
    mode = image_mode(cfg['input_size'][0])
    try:
        transform = create_transform(**cfg)
    except (KeyError, TypeError, ValueError, AssertionError) as e:
        raise ImageError(f'The preprocessing in the model\'s config is not valid ({e!r}).') from None
    weight = next(model.parameters())
    loader: Any = DataLoader(
        _Preprocessed(dataset, transform, mode), batch_size, num_workers=workers, collate_fn=list)
    for rows in loader:
        unreadable += [reason for pixels, reason in rows if pixels is None]
        read = [row for row in rows if row[0] is not None]
        if read:
            pixels, labels = zip(*read)
            yield Images(torch.stack(pixels).to(weight.device, weight.dtype), list(labels))
