"""Image files as a model wants them."""
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_eca.errors import TimmEcaError, first_line

__all__ = ['IMAGE_MODES', 'ImageError', 'Images', 'find_images', 'image_extensions', 'open_image', 'read_images']


IMAGE_MODES = {1: 'L', 3: 'RGB'}  # Pillow's names, by the channels that a model takes


class ImageError(TimmEcaError, ValueError):
    """Images that aren't there, or of a kind that the model can't take."""


class Images(NamedTuple):
    """A batch."""
    paths: list[Path]
    pixels: torch.Tensor  # (N, C, H, W)


@cache
def image_extensions() -> frozenset[str]:
    """The extensions of the files that are read, in lower case, with their dot."""
    return frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in _formats())


@cache
def _formats() -> tuple[str, ...]:
    """What photographs come in. Pillow goes by the content: a file named .jpg can be of any format that it knows."""
    Image.init()
    common = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'JPEG2000', 'PPM')
    return tuple(kind for kind in common if kind in Image.OPEN)


def open_image(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """Opens an image of one of the common formats; the readers of Pillow for others, seldom looked at, never see it.

    Raises:
        PIL.UnidentifiedImageError: It is none of them.
        OSError: It can't be read.
    """
    return Image.open(file, formats=_formats())


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, and the images below folders, sorted, by their extensions.

    Raises:
        ImageError: A path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob('*') if p.suffix.lower() in image_extensions() and p.is_file())
            if not below:
                raise ImageError(f'{path} has no images (.jpg, .png, .webp, ...): name a folder that has.')
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f'{path} does not exist, or is no file: name images, or folders of them.')
    return found


def read_images(
        model: nn.Module,
        paths: Iterable[Path],
        batch_size: int,
        unreadable: list[tuple[Path, str]],
) -> Iterator[Images]:
    """Reads images in batches with the preprocessing of a model's weights, on its device and in its dtype.

    Args:
        model: A timm model.
        paths: Image files.
        batch_size: Number of images in a batch, the last excepted.
        unreadable: Gets each file that is no image, or a damaged one, and why. It is left out.

    Raises:
        ImageError: The model takes neither grey nor colour images.
    """
    cfg = resolve_data_config({}, model=model)
    channels = cfg['input_size'][0]
    if channels not in IMAGE_MODES:
        raise ImageError(f'The model takes {channels} channels: image files have 1 or 3.')
    try:
        transform: Any = create_transform(**cfg)
    except (KeyError, TypeError, ValueError, AssertionError) as e:
        raise ImageError(f'The model\'s config says how to prepare images in a way that can\'t be ({e!r}).') from None
    weight = next(model.parameters())

    batch: list[tuple[Path, torch.Tensor]] = []

    def collect() -> Images:
        pixels = torch.stack([x for _, x in batch]).to(weight.device, weight.dtype)
        return Images([path for path, _ in batch], pixels)

    for path in paths:
        try:
            with open_image(path) as image:
                pixels = transform(image.convert(IMAGE_MODES[channels]))
        except Exception as e:  # Pillow's readers raise whatever a damaged file makes them stumble over
            unreadable.append((path, first_line(e, 200)))
            continue
        batch.append((path, pixels))
        if len(batch) == batch_size:
            yield collect()
            batch = []
    if batch:
        yield collect()
