"""Makes a model with the weights that its training starts from."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import constants
from timm.models import create_model

from timm_eca.conversion.pretrained import find_pretrained
from timm_eca.conversion.reader import read_checkpoint
from timm_eca.errors import ModelError, TimmEcaError, first_line
from timm_eca.finetune.settings import FinetuneError, Settings
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.models.checkpoint_filter import check_complete
from timm_eca.weights.hub import fetch_and_check
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.model_folder import CONFIG_FILE, FolderError, check_folder, weights_path
from timm_eca.weights.store import WeightsNotFoundError

__all__ = ['create_with_weights']

# What timm, torch and the Hub's client raise for arguments or weights that don't fit, and without a network.
_ERRORS = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def create_with_weights(settings: Settings, class_names: Sequence[str]) -> tuple[nn.Module, str]:
    """Makes the model with its weights, and says in words where they are from.

    Its `pretrained_cfg` has the `license` and `hf_hub_id` of the weights, or None if they are not known.

    Raises:
        TimmEcaError: There is no such model, it can't be made with these settings, or there are no weights that fit it.
    """
    num_classes, checkpoint = len(class_names), settings.initial_checkpoint
    kwargs: dict[str, Any] = {  # timm leaves out None
        'num_classes': num_classes, 'drop_rate': settings.drop, 'drop_path_rate': settings.drop_path,
        'in_chans': None if settings.in_chans == 3 else settings.in_chans, **settings.model_args}
    problem, fix = f'{settings.model} can\'t be made', 'change --model-kwargs, or try --no-pretrained'
    if checkpoint is not None:
        problem = f'{settings.model} can\'t start from {checkpoint}'
        fix = 'name weights of this model or of the one it is based on'
    try:
        name = fetch_and_check(settings.model)
        if checkpoint is not None:
            model, start = _create_from(name, checkpoint, settings.ema, kwargs)
        else:
            model, start = _create_pretrained(settings, name, kwargs)
    except FolderError as e:
        raise FinetuneError(e.problem, *e.fixes, 'name a folder that convert or finetune made') from e
    except ModelError as e:
        if checkpoint is None:
            raise
        raise FinetuneError(f'{problem} ({e.problem})', fix) from e
    except TimmEcaError:
        raise
    except _ERRORS as e:
        raise FinetuneError(f'{problem} ({first_line(e)})', fix) from e
    cfg: Any = model.pretrained_cfg
    from_scratch = checkpoint is None and not settings.pretrained
    other_classes = cfg.get('label_names') and list(cfg['label_names']) != list(class_names)
    if from_scratch or other_classes or cfg['num_classes'] != num_classes:
        # The fewer the classes, the larger are EfficientNets' initial classifiers, and these learn slowly.
        model.reset_classifier(num_classes)  # type: ignore[operator]
    if from_scratch:
        cfg.update(license=None, hf_hub_id=None)
    elif settings.model.startswith('hf-hub:') and checkpoint is None:
        cfg['hf_hub_id'] = settings.model.removeprefix('hf-hub:').partition('@')[0]
    return model, start


def _create_pretrained(settings: Settings, name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, str]:
    """Makes the model with its pretrained weights, or with random ones."""
    if not settings.pretrained:
        return create_model(name, **kwargs), 'random weights'
    if name.startswith('local-dir:'):  # a folder or a repository
        start = settings.model if settings.model.startswith('hf-hub:') else Path(name).name
        return create_model(name, pretrained=True, **kwargs), start
    try:
        find_pretrained(name)
    except WeightsNotFoundError as e:
        if not e.sources:
            raise
        raise WeightsNotFoundError(
            f'No weights for {name}',
            f'{e.fixes[0]} (HF_ENDPOINT is {constants.ENDPOINT})',
            'start from weights on this machine with --initial-checkpoint PATH',
            'start from random weights with --no-pretrained', sources=e.sources) from e
    model = create_model(name, pretrained=True, **kwargs)
    cfg = model.pretrained_cfg
    return model, f'the pretrained weights {cfg["architecture"]}' + (f'.{cfg["tag"]}' if cfg.get('tag') else '')


def _create_from(name: str, checkpoint: str, ema: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, str]:
    """Makes the model with the weights of a file or a folder."""
    path = Path(checkpoint)
    if not path.exists():
        raise FinetuneError(f'{path} does not exist', 'name a file or a folder with weights')
    # These describe the model's own weights. With a `source`, timm would ignore the state dict.
    overlay: dict[str, Any] = dict.fromkeys(
        ('source', 'file', 'license', 'hf_hub_id', 'label_names', 'label_descriptions'))
    if (path / CONFIG_FILE).exists():
        config = check_folder(path, exact=False)
        if config['architecture'] == name.partition('.')[0]:
            return create_model(f'local-dir:{path}', pretrained=True, **kwargs), f'the weights in {path.name}'
        config = config.get('pretrained_cfg', {})
        kept = ('mean', 'std', 'interpolation', 'crop_pct', 'license')
        overlay |= {key: config[key] for key in kept if key in config}
        path = weights_path(path)
    content = read_checkpoint(path, ema)
    state_dict = to_timm(content.state_dict)
    model = create_model(name, pretrained=True, pretrained_cfg_overlay={**overlay, 'state_dict': state_dict}, **kwargs)
    start = f'the weights {Path(checkpoint).name}' + (f' ({content.part})' if content.part else '')
    places = tuple(f'{place}.attn.' for place, _ in named_norm_attn(model))
    if not places:
        check_complete(state_dict, model)  # models with ECA check this themselves
    elif not any(key.startswith(places) for key in state_dict):
        start += ' without ECA (a warm start)'
    return model, start
