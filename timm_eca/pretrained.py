"""Where pretrained weights come from: the weights directory of this machine, then the Hugging Face Hub.

The weights directory holds one folder for each `<model>.<tag>`, as `convert_weights.py` writes them: `config.json`,
`model.safetensors` and a card.
"""
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import constants
from timm.models.efficientnet import EfficientNetFeatures

from timm_eca.key_maps import GATE, kernel_sizes_by_stage, to_timm
from timm_eca.official import OFFICIAL

__all__ = [
    'HUB_ORG', 'WeightsNotFoundError', 'checkpoint_filter_fn', 'find_local_weights', 'hub_id', 'names_source',
    'unknown_tag', 'weights_dir', 'weights_not_found',
]

HUB_ORG = 'timm-eca'  # the organisation on the Hub that holds the converted weights; $TIMM_ECA_HUB_ORG goes before it
CARD_FILE = 'README.md'
WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'


class WeightsNotFoundError(RuntimeError):
    """Pretrained weights were asked for that are neither on this machine nor to be had from the Hub."""


def hub_id(name: str) -> str:
    """The repository on the Hub of a `<model>.<tag>`."""
    return f'{os.environ.get("TIMM_ECA_HUB_ORG") or HUB_ORG}/{name}'


def weights_dir() -> Path:
    """The weights directory: `$TIMM_ECA_HOME`, else `timm_eca` in huggingface_hub's `HF_HOME`."""
    home = os.environ.get('TIMM_ECA_HOME')
    return Path(home).expanduser() if home else Path(constants.HF_HOME) / 'timm_eca'


def find_local_weights(name: str) -> Path | None:
    """The folder of a `<model>.<tag>` in the weights directory, or None where it has none.

    Raises:
        WeightsNotFoundError: There is a folder of that name, but it isn't a whole one or holds another model.
    """
    folder = weights_dir() / name
    if not folder.is_dir():
        return None
    model = name.partition('.')[0]
    cure = f'convert the weights again with `timm-eca convert --force`, or remove {folder}'
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsNotFoundError(f'{folder} has no {WEIGHTS_FILE}: {cure}.')
    try:
        architecture = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))['architecture']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsNotFoundError(f'{folder / CONFIG_FILE} is not the config of a model ({e}): {cure}.') from None
    if architecture != model:
        raise WeightsNotFoundError(f'{folder} holds a model of architecture {architecture!r}, not {model}: {cure}.')
    return folder


def names_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a pretrained config, or an overlay over one, names another source of weights than a repository."""
    return any(cfg.get(key) for key in ('source', 'file', 'url', 'state_dict'))


def unknown_tag(name: str, known: list[str]) -> WeightsNotFoundError:
    """The error for a tag that neither timm's registry nor the weights directory has."""
    return WeightsNotFoundError(
        f'Unknown weights {name}: there are {", ".join(known)}, and no folder {weights_dir() / name}.'
    )


def weights_not_found(name: str, reason: Exception) -> WeightsNotFoundError:
    """The error for weights that are in neither place: what was looked for, and the ways on."""
    model = name.partition('.')[0]
    ways = []
    if model in OFFICIAL:
        official = OFFICIAL[model]
        ways.append(
            f'download the authors\' file from {official.url} and run `timm-eca convert {official.file}` '
            f'(or both at once, `timm-eca convert --download {model}`)'
        )
    ways += [
        'set TIMM_ECA_HUB_ORG to an organisation of the Hub that has it',
        'load a folder that you have: create_model(\'local-dir:FOLDER\', pretrained=True)',
        'or start from random weights: pretrained=False',
    ]
    why = ' '.join(str(reason).split('\n\n')[0].split())
    return WeightsNotFoundError(
        f'No weights for {name}: they are neither in {weights_dir() / name} nor on the Hub as {hub_id(name)} '
        f'({type(reason).__name__}: {why}). Ways on: ' + '; '.join(ways) + '.'
    )


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Brings a checkpoint to the model's keys, and refuses one that would leave a part of the model as it was.

    timm loads without checking for missing tensors when the number of classes differs, so it's done here.

    Args:
        state_dict: Tensors by timm's or by the authors' keys.
        model: The model that they are for.

    Raises:
        ValueError: The checkpoint has no ECA, other kernel sizes, or lacks tensors of the model.
    """
    state_dict = to_timm(state_dict)
    expected = model.state_dict()
    if isinstance(model, EfficientNetFeatures):  # has no head
        state_dict = {k: v for k, v in state_dict.items() if k.split('.')[0] not in ('conv_head', 'bn2', 'classifier')}

    gates = [key for key in expected if key.endswith(GATE)]
    missing = [key for key in gates if key not in state_dict]
    if missing:
        raise ValueError(
            f'The checkpoint has {len(gates) - len(missing)} of the model\'s {len(gates)} ECA layers, {missing[0]} is '
            'not there: it is not one of this model with ECA.'
        )
    if any(state_dict[key].shape != expected[key].shape for key in gates):
        found, wanted = (
            [size for sizes in kernel_sizes_by_stage(tensors).values() for size in sizes]
            for tensors in (state_dict, expected)
        )
        raise ValueError(
            f'The checkpoint has ECA kernels of sizes {found}, by stage, where the model has {wanted}: create the '
            f'model with kernel_sizes={found}.'
        )

    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get('classifier')
    optional = (f'{classifier}.weight', f'{classifier}.bias')
    missing = [k for k in expected if k not in state_dict and k not in optional]
    if missing:
        raise ValueError(f'The checkpoint lacks {len(missing)} tensors of the model, {missing[0]} the first of them.')
    return state_dict
