"""Loads models and classifies images."""
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import create_model

from timm_eca.conversion.pretrained import find_pretrained
from timm_eca.conversion.reader import read_checkpoint
from timm_eca.errors import ModelError, TimmEcaError, first_line, printable
from timm_eca.images.batches import Images
from timm_eca.weights.hub import fetch_and_check
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.model_folder import FolderError

__all__ = ['class_names', 'load_model', 'predict']


def load_model(
        name: str,
        checkpoint: str | os.PathLike | None = None,
        use_ema: bool = True,
        img_size: int | None = None,
) -> nn.Module:
    """Loads a model with its weights, in eval mode.

    Args:
        name: A registered name, a folder, or `hf-hub:<ORGANISATION>/<NAME>`.
        checkpoint: A file with weights, see `read_checkpoint`. None: the pretrained weights.
        use_ema: Prefer the averaged weights (EMA) if the checkpoint has both.
        img_size: Height and width of the images in pixels. None: the size in the model's config.

    Raises:
        WeightsNotFoundError: No source has the weights of a registered model.
        HubError: The repository can't be downloaded.
        UnknownModelError: There is no such model.
        CheckpointError: The checkpoint can't be read.
        ModelError: The model can't be built, the weights don't fit it, or it can't take images of this size.
    """
    place, fixes = printable(name), ['name another model: timm-eca list shows the registered ones']
    try:
        source = fetch_and_check(name)
        if checkpoint is None and not source.startswith('local-dir:'):
            find_pretrained(source)  # its error names what to do, also for timm's own models
        overlay: dict[str, Any] = {}
        cfg = {} if checkpoint is img_size is None else create_model(source, device='meta').pretrained_cfg
        if img_size is not None:
            overlay['input_size'] = (cfg['input_size'][0], img_size, img_size)
            fixes.append('choose another --img-size')
        if checkpoint is not None:
            place += f' with the weights {checkpoint}'
            fixes[0] = 'name the model that the checkpoint was trained as'
            state_dict = to_timm(read_checkpoint(checkpoint, use_ema).state_dict)
            # timm prefers `source` and `file` to a state dict.
            overlay |= {'source': None, 'file': None, 'state_dict': state_dict}
            classifier = state_dict.get(f'{cfg.get("classifier")}.weight')
            if classifier is not None:
                overlay['num_classes'] = len(classifier)
        model = create_model(
            source, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=overlay.get('num_classes')).eval()
        with torch.inference_mode():  # fails here if the model can't take images of this size
            model(torch.zeros(1, *resolve_data_config({}, model=model)['input_size']))
        return model
    except FolderError as e:
        raise ModelError(
            e.problem, 'name a folder that convert or finetune made, or a registered model (timm-eca list)') from e
    except ModelError as e:
        problem = f'the model {place} can\'t be loaded ({e.problem})'
        raise ModelError(problem, *(fixes if checkpoint else e.fixes)) from e
    except TimmEcaError:
        raise
    except Exception as e:  # timm raises errors of any type for the config and the weights of others
        reason = printable(' '.join([type(e).__name__, *str(e).split()]), 300)
        raise ModelError(f'the model {place} can\'t be loaded ({reason})', *fixes) from e


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
