"""Loads the model that the options of a command name."""
import argparse
from pathlib import Path

import torch
import torch.nn as nn

from timm_eca.analysis.predict import load_model
from timm_eca.errors import ModelError, first_line, printable
from timm_eca.finetune.state import STATE_ERRORS, STATE_FILE
from timm_eca.weights.model_folder import CONFIG_FILE

__all__ = ['load']

_WEIGHTS = ('.bin', '.ckpt', '.pt', '.pth', '.safetensors', '.tar')  # extensions of files with weights


def load(args: argparse.Namespace) -> nn.Module:
    """Loads the model on its device, in eval mode, see `add_model_arguments` and `load_model`.

    Raises:
        ModelError: The model or the device can't be used.
    """
    if args.checkpoint and Path(args.checkpoint).match(STATE_FILE):
        raise ModelError(
            f'{args.checkpoint} is the state of a finetune run, not a checkpoint of a model',
            f'use the model of the run instead: --model {Path(args.checkpoint).parents[1]}')
    _check_path(args.model)
    model = load_model(args.model, args.checkpoint, not args.no_ema, args.img_size)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as e:  # torch raises either for an absent device
        raise ModelError(f'The device {device} can\'t be used ({first_line(e)})', 'choose --device cpu') from e


def _check_path(name: str) -> None:
    """Raises a ModelError for a path that is no folder of a model."""
    shown, path = printable(name, 400), Path(name)
    if path.is_file():
        raise ModelError(
            f'{shown} is a file, not a model', f'name its model and the file: --model MODEL --checkpoint {shown}',
            f'or make a folder of it: timm-eca convert {shown} --output DIR')
    if not path.exists() and ':' not in name and ('/' in name or '\\' in name or path.suffix in _WEIGHTS):
        fixes = ['check the path']
        if name.count('/') == 1 and name[0].isalnum():
            fixes.append(f'name a repository of the Hub as hf-hub:{shown}')
        raise ModelError(f'{shown} does not exist', *fixes)
    if (path / STATE_FILE).exists() and not (path / CONFIG_FILE).exists():
        raise ModelError(f'{shown} holds an unfinished run of finetune', _how_to_continue(path / STATE_FILE))


def _how_to_continue(state: Path) -> str:
    try:
        command = torch.load(state, map_location='cpu', mmap=True, weights_only=True)['command']
    except STATE_ERRORS:  # of an older version, or damaged
        return 'run the same timm-eca finetune command again'
    return f'continue it with `{printable(str(command), 1000)}`'
