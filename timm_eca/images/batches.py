"""Images with labels, and batches of them for a model."""
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

__all__ = ['Attempt', 'ImageFiles', 'Images', 'find_unreadable', 'read_batches', 'read_images', 'try_to_read']

Images = tuple[torch.Tensor, list[Any]]  # a batch, (N, C, H, W), and its labels


class ImageFiles(Dataset):
    """Images in one of Pillow's modes, with a label each."""

    def __init__(self, files: Sequence[Any], labels: Sequence[Any], mode: str) -> None:
        self.files = files  # paths, open files, images, or functions that return one of these
        self.labels = labels
        self.mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file = self.files[index]
        if callable(file):
            file = file()
        return file if isinstance(file, Image.Image) else read_image(file, self.mode), self.labels[index]

    def name(self, index: int) -> str:
        """The path of an image, or its number."""
        file = self.files[index]
        return os.fspath(file) if isinstance(file, str | os.PathLike) else f'image {index}'

    def part(self, indices: Iterable[int]) -> 'ImageFiles':
        """Some of the images."""
        chosen = list(indices)
        return ImageFiles([self.files[i] for i in chosen], [self.labels[i] for i in chosen], self.mode)


class Attempt(NamedTuple):
    """An image and its label, or why the image could not be read."""
    number: int
    image: Any = None
    label: Any = None
    problem: str | None = None


def try_to_read(dataset: Any, index: int) -> Attempt:
    """Reads one image of a dataset."""
    try:
        return Attempt(index, *dataset[index])
    except Exception as e:  # Pillow's readers raise many types for a damaged file
        return Attempt(index, problem=f'{dataset.name(index)}: {first_line(e, 200)}')


class _Attempts(Dataset):

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Attempt:
        attempt = try_to_read(self.dataset, index)
        return attempt if attempt.problem else attempt._replace(image=self.transform(attempt.image))


def _collate(attempts: Sequence[Attempt]) -> tuple[torch.Tensor | None, list[Any], dict[int, str]]:
    # One tensor: each tensor that a worker sends needs a file descriptor.
    read = [attempt for attempt in attempts if attempt.problem is None]
    pixels = torch.stack([attempt.image for attempt in read]) if read else None
    problems = {attempt.number: attempt.problem for attempt in attempts if attempt.problem is not None}
    return pixels, [attempt.label for attempt in read], problems


def _no_pixels(image: Image.Image) -> torch.Tensor:
    return torch.empty(0)


def find_unreadable(dataset: Any, workers: int = 0) -> dict[int, str]:
    """Reads each image of a dataset once, with a number of processes.

    Returns:
        The names and the problems of the images that can't be read, by their indices.
    """
    loader: Any = DataLoader(_Attempts(dataset, _no_pixels), 64, num_workers=workers, collate_fn=_collate)
    found: dict[int, str] = {}
    for _, _, problems in tqdm(loader, 'checking images', leave=False, disable=None):
        found |= problems
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
        dataset: Any,
        batch_size: int,
        unreadable: list[str],
        workers: int = 0,
        data_config: dict[str, Any] | None = None,
) -> Iterator[Images]:
    """Reads images in batches, preprocessed as the model's weights need, on its device and in its dtype.

    Args:
        model: A timm model.
        dataset: `ImageFiles` in the mode that the model takes.
        batch_size: Number of images in a batch.
        unreadable: Gets the images that can't be read, and why. The batches leave them out.
        workers: Number of processes that read.
        data_config: Another preprocessing, as from `timm.data.resolve_data_config`.

    Raises:
        RuntimeError: A process that reads has died.
    """
    transform = create_transform(**(data_config or resolve_data_config({}, model=model)))
    weight = next(model.parameters())
    loader: Any = DataLoader(_Attempts(dataset, transform), batch_size, num_workers=workers, collate_fn=_collate)
    for pixels, labels, problems in tqdm(loader, leave=False, disable=None):
        unreadable += problems.values()
        if pixels is not None:
            yield pixels.to(weight.device, weight.dtype), labels
