"""Reads one image file, for all commands.

The content decides what a file is, not its name. EXIF orientation is not applied, as in timm: a model sees images as in
training.
"""
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from timm_eca.errors import TimmEcaError

__all__ = ['ImageError', 'has_image_name', 'image_mode', 'read_image']

# The formats of photographs. Pillow's readers of rare formats get less scrutiny, so they never see a file.
_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'JPEG2000', 'PPM')
_HEIF_NAMES = {'.heic', '.heif', '.hif'}


class ImageError(TimmEcaError, ValueError):
    """Images that are missing, can't be read, or don't fit the task or the model."""


@cache
def _formats() -> dict[str, str]:
    """The formats that this Pillow can read, by extension."""
    extensions = Image.registered_extensions()
    return {extension: kind for extension, kind in extensions.items() if kind in _FORMATS and kind in Image.OPEN}


def has_image_name(path: Path) -> bool:
    """Whether a file has the extension of an image format. HEIC counts even without pillow-heif."""
    return path.suffix.lower() in _HEIF_NAMES or path.suffix.lower() in _formats()


def read_image(file: str | os.PathLike | IO[bytes], mode: str = 'RGB') -> Image.Image:
    """Reads an image of a common format, and HEIC if pillow-heif is installed. Closes an open file.

    Raises:
        ImageError: It has another format, or its pixels have no known range.
        Exception: It is damaged. Pillow's readers raise many types.
    """
    with open(file, 'rb') if isinstance(file, str | os.PathLike) else file as stream:
        try:
            with Image.open(stream, formats=[*dict.fromkeys(_formats().values())]) as image:
                return _to_mode(image, mode)
        except UnidentifiedImageError:
            stream.seek(0)
        with suppress(ImportError):
            import pillow_heif  # not its register_heif_opener(): that changes Pillow for the whole process
            if pillow_heif.is_supported(stream):
                return _to_mode(pillow_heif.open_heif(stream).to_pillow(), mode)
    raise ImageError('it is not an image of a common format (JPEG, PNG, WebP, ...; HEIC: pip install pillow-heif)')


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts an image as timm does. Of 16-bit grey it keeps the upper 8 bits, as Pillow does for 16-bit colours."""
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        image = image.convert('I').point(lambda value: value / 256)
    elif image.mode in ('I', 'F'):  # no file format tells the range
        raise ImageError(
            f'its pixels have 32 bits (mode {image.mode}) and no known range', 'save it with 8 or 16 bits')
    return image.convert(mode)


def image_mode(channels: int) -> str:
    """Pillow's image mode for 1 or 3 channels."""
    if channels not in (1, 3):
        raise ImageError(f'The model takes {channels} channels', 'choose 1 or 3, as image files have')
    return 'L' if channels == 1 else 'RGB'
