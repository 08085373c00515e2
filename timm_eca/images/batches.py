"""Batches of images for a model."""
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

__all__ = ['Attempt', 'ImageFiles', 'Images', 'name_of', 'read_batches', 'read_images', 'read_rows', 'try_to_read']

Images = tuple[torch.Tensor, list[Any]]  # a batch, (N, C, H, W), and its labels


class ImageFiles(Dataset):
    """Files with a label each, read as images in one of Pillow's modes."""

    def __init__(self, samples: Any, mode: str) -> None:
        self.samples = samples  # (path or open file, label): a list, or a reader of timm
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.samples[index]
        return read_image(file, self.mode), label


def name_of(dataset: Any, index: int) -> str:
    """The path of an example, or its number if the dataset has no list of files."""
    samples = getattr(dataset, 'samples', None)
    return os.fspath(samples[index][0]) if isinstance(samples, list) else f'image {index}'


class Attempt(NamedTuple):
    """An example that was read, or why it could not be read."""
    image: Any
    label: Any = None
    problem: str | None = None


def try_to_read(dataset: Any, index: int) -> Attempt:
    """Reads an example of a dataset of images and labels."""
    try:
        return Attempt(*dataset[index])
    except Exception as e:  # Pillow's readers raise many types for a damaged file
        return Attempt(None, problem=f'{name_of(dataset, index)}: {first_line(e, 200)}')


class _Attempts(Dataset):

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Attempt:
        attempt = try_to_read(self.dataset, index)
        return attempt if attempt.problem else attempt._replace(image=self.transform(attempt.image))


def read_rows(
        dataset: Any,
        transform: Callable[[Image.Image], Any],
        batch_size: int,
        workers: int,
        collate: Callable[[list[Attempt]], Any],
        text: str | None = None,
) -> Iterator[Any]:
    """Reads and transforms all examples of a dataset in batches. A terminal shows a progress bar."""
    loader: Any = DataLoader(_Attempts(dataset, transform), batch_size, num_workers=workers, collate_fn=collate)
    return iter(tqdm(loader, text, leave=False, disable=None))


def _stack(rows: Sequence[Attempt]) -> tuple[torch.Tensor | None, list[Any], list[str]]:
    # One tensor: each tensor that a worker sends needs a file descriptor.
    read = [row for row in rows if row.problem is None]
    pixels = torch.stack([row.image for row in read]) if read else None
    return pixels, [row.label for row in read], [row.problem for row in rows if row.problem is not None]


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
    """Reads images in batches, preprocessed as the model's weights need, on its device and in its dtype.

    Args:
        model: A timm model.
        dataset: Images in the mode that the model takes, and their labels.
        batch_size: Number of images in a batch.
        unreadable: Gets the images that can't be read, and why. The batches leave them out.
        workers: Number of processes that read.

    Raises:
        RuntimeError: A process that reads has died.
    """
    transform = create_transform(**resolve_data_config({}, model=model))
    weight = next(model.parameters())
    for pixels, labels, problems in read_rows(dataset, transform, batch_size, workers, _stack):
        unreadable += problems
        if pixels is not None:
            yield pixels.to(weight.device, weight.dtype), labels
