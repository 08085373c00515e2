"""Loads models and classifies images."""
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import create_model

from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.images.batches import Images
from timm_eca.weights.hub import fetch_and_check
from timm_eca.weights.model_folder import FolderError

__all__ = ['ModelError', 'class_names', 'load_model', 'predict']


class ModelError(TimmEcaError, ValueError):
    """A model that can't be loaded."""


def load_model(name: str) -> nn.Module:
    """A pretrained model by its registered name, its folder, or `hf-hub:<ORGANISATION>/<NAME>`, in eval mode.

    Raises:
        WeightsNotFoundError: The weights of a registered model are nowhere.
        HubError: The repository can't be had.
        UnknownModelError: There is no such model.
        ModelError: Its folder or repository can't be loaded, or it can't take images of the
            size that its config says.
    """
    cure = 'name a registered model (timm-eca list), a folder that convert or finetune made, or hf-hub:REPOSITORY.'
    try:
        model = create_model(fetch_and_check(name), pretrained=True).eval()
        with torch.inference_mode():  # its config may name a size that it can't take
            model(torch.zeros(1, *resolve_data_config({}, model=model)['input_size']))
        return model
    except FolderError as e:
        raise ModelError(f'{e}: {cure}') from None
    except TimmEcaError:
        raise
    except Exception as e:  # timm and the Hub's client raise many kinds
        raise ModelError(f'the model {printable(name)} can\'t be loaded ({first_line(e)}): {cure}') from None


def class_names(model: nn.Module) -> list[str]:
    """The names of a model's classes: from its config, else ImageNet's if the number fits, else the numbers."""
    network: Any = model
    cfg, count = network.pretrained_cfg, network.num_classes
    names = cfg.get('label_names')
    if isinstance(names, dict):  # by number, perhaps with gaps
        names = [names.get(str(i), names.get(i, str(i))) for i in range(count)]
    if names and len(names) == count:
        names = [str(name) for name in names]
        descriptions = cfg.get('label_descriptions') or {}
        return [(descriptions.get(name) or name) if isinstance(descriptions, dict) else name for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]


def predict(
        model: nn.Module, batches: Iterable[Images], topk: int = 5) -> Iterator[tuple[Any, list[tuple[int, float]]]]:
    """Yields the most probable classes of each image.

    Args:
        model: A timm model in eval mode.
        batches: Images with their paths, as from `read_images`.
        topk: Number of classes for each image.

    Yields:
        The path of an image, and its classes with their probabilities, the most probable first.

    Raises:
        ModelError: The model has no classes, or can't take batches of this size.
    """
    network: Any = model
    if not network.num_classes:
        raise ModelError('the model has no classes', 'choose a model with a classifier')
    for pixels, paths in batches:
        try:
            with torch.inference_mode():
                probabilities = model(pixels).float().softmax(-1)
        except RuntimeError as e:
            raise ModelError(
                f'{len(pixels)} images at a time can\'t be classified ({first_line(e)})', 'lower --batch-size') from e
        values, classes = probabilities.topk(min(topk, probabilities.shape[-1]))
        for path, *best in zip(paths, classes.tolist(), values.tolist()):
            yield path, list(zip(*best))
