"""Images with labels, and batches of them for a model."""
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from timm_eca.errors import first_line
from timm_eca.images.reader import image_mode, read_image

__all__ = ['Checked', 'ImageFiles', 'Images', 'read_all', 'read_batches', 'read_images']

Images = tuple[torch.Tensor, list[Any]]  # a batch, (N, C, H, W), and its labels


class Attempt(NamedTuple):
    """An image and its label, or why the image could not be read."""
    number: int
    image: Any
    label: Any
    problem: str | None = None


class Checked(NamedTuple):
    """What reading all images has found, by their indices."""
    problems: dict[int, str]  # names of images that can't be read, and why
    digests: dict[int, bytes]  # of the pixels of the others


class ImageFiles(Dataset):
    """Images in one of Pillow's modes, with a label each."""

    def __init__(self, files: Sequence[Any], labels: Sequence[Any], mode: str) -> None:
        self.files = files  # paths, images, or functions that open a file
        self.labels = labels
        self.mode = mode
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Attempt:
        file, label = self.files[index], self.labels[index]
        try:
            image = file if isinstance(file, Image.Image) else read_image(file() if callable(file) else file, self.mode)
        except Exception as e:  # Pillow's readers raise many types for a damaged file
            return Attempt(index, None, label, f'{self.name(index)}: {first_line(e, 200)}')
        return Attempt(index, image if self.transform is None else self.transform(image), label)

    def name(self, index: int) -> str:
        """The path of an image, or its number."""
        file = self.files[index]
        return os.fspath(file) if isinstance(file, str | os.PathLike) else f'image {index}'

    def part(self, indices: Iterable[int]) -> 'ImageFiles':
        """Some of the images."""
        chosen = list(indices)
        return ImageFiles([self.files[i] for i in chosen], [self.labels[i] for i in chosen], self.mode)


def _collate(attempts: Sequence[Attempt]) -> tuple[torch.Tensor | None, list[Any], dict[int, str]]:
    # One tensor: each tensor that a worker sends needs a file descriptor.
    read = [attempt for attempt in attempts if attempt.problem is None]
    pixels = torch.stack([attempt.image for attempt in read]) if read else None
    problems = {attempt.number: attempt.problem for attempt in attempts if attempt.problem is not None}
    return pixels, [attempt.label for attempt in read], problems


def _digest(image: Image.Image) -> torch.Tensor:
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _load(
        images: ImageFiles,
        transform: Callable[[Image.Image], torch.Tensor],
        batch_size: int,
        workers: int,
        text: str | None = None,
) -> Iterator[tuple[torch.Tensor | None, list[Any], dict[int, str]]]:
    """Yields the pixels, the labels, and the problems by index of each batch. The first process shows the progress."""
    images.transform = transform
    loader: Any = DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate)
    is_first = os.environ.get('RANK', '0') == '0'  # of torchrun
    return iter(tqdm(loader, text, leave=False, disable=None if is_first else True))  # None: if there is a terminal


def read_all(images: ImageFiles, workers: int = 0) -> Checked:
    """Reads each image once, with a number of processes."""
    found, start = Checked({}, {}), 0
    for digests, labels, problems in _load(images, _digest, 64, workers, 'checking images'):
        end = start + len(labels) + len(problems)
        found.problems.update(problems)
        if digests is not None:
            readable = [i for i in range(start, end) if i not in problems]
            found.digests.update(zip(readable, (bytes(digest.tolist()) for digest in digests)))
        start = end
    return found


def read_images(
        model: nn.Module,
        paths: Iterable[Path],
        batch_size: int,
        unreadable: list[str],
) -> Iterator[Images]:
    """Reads image files as `read_batches` does. Their labels are their paths."""
    files, mode = list(paths), image_mode(resolve_data_config({}, model=model)['input_size'][0])
    return read_batches(model, ImageFiles(files, files, mode), batch_size, unreadable)


def read_batches(
        model: nn.Module,
        images: ImageFiles,
        batch_size: int,
        unreadable: list[str],
        workers: int = 0,
        data_config: dict[str, Any] | None = None,
) -> Iterator[Images]:
    """Reads images in batches, preprocessed as the model's weights need, on its device and in its dtype.

    Args:
        model: A timm model.
        images: Images in the mode that the model takes.
        batch_size: Number of images in a batch.
        unreadable: Gets the images that can't be read, and why. The batches leave them out.
        workers: Number of processes that read.
        data_config: Another preprocessing, as from `timm.data.resolve_data_config`.

    Raises:
        RuntimeError: A process that reads has died.
    """
    transform = create_transform(**(data_config or resolve_data_config({}, model=model)))
    weight = next(model.parameters())
    for pixels, labels, problems in _load(images, transform, batch_size, workers):
        unreadable += problems.values()
        if pixels is not None:
            yield pixels.to(weight.device, weight.dtype), labels
