"""The settings of a fine-tuning run: the options of `timm-eca finetune`. An option of timm's `train.py` has its name.

This module imports nothing heavy: the command line reads it to show its help.
"""
import math
import shlex
from argparse import Namespace
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, TypeVar

from timm_eca.errors import TimmEcaError

__all__ = ['FinetuneError', 'Settings', 'as_option', 'flag']

T = TypeVar('T')

# For grey images of digits: no mirror images, nearly all of the image, no change of grey.
_DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 6, 'img_size': 24, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}
# Optimizers of timm that the loop can't serve, and why.
_OTHER_OPTIMIZERS = {
    'adahessian': 'it needs second derivatives', 'kron*': 'without opt_einsum it needs 110 GB of memory',
    'fused*': 'it needs the package apex', 'bnb*': 'it needs the package bitsandbytes'}


class FinetuneError(TimmEcaError, ValueError):
    """A run that can't start or continue."""


def _option(default: T, group: str, help: str, **argument: Any) -> T:
    """A setting with its group and its text in the command's help, and further arguments of `add_argument`.

    `least` and `most` are its bounds. With `free=True` it may differ when a run continues.
    """
    return field(default=default, metadata={'group': group, 'help': help, **argument})


@dataclass(frozen=True)
class Settings:
    """What a run does. None means the model's own value, or nothing."""
    data: str
    model: str = field(metadata={
        'group': 'model', 'help': 'name of a registered model, hf-hub:ORGANISATION/NAME, or a folder'})

    initial_checkpoint: str | None = _option(
        None, 'model', 'weights to start from, a file or a folder; those without ECA are a warm start', metavar='PATH')
    ema: bool = _option(
        True, 'model', 'if the checkpoint has EMA weights, start from the raw weights instead')
    pretrained: bool = _option(True, 'model', 'start from random weights instead of pretrained ones')
    model_kwargs: tuple[str, ...] | None = _option(
        None, 'model', 'arguments of the model, such as kernel_sizes=3,5,5,7 or attn_layer=se', metavar='NAME=VALUE',
        nargs='+')
    in_chans: int = _option(3, 'model', 'channels of the images, 1 or 3')
    drop: float | None = _option(None, 'model', 'dropout rate before the classifier', least=0, most=1)
    drop_path: float | None = _option(None, 'model', 'drop path rate', least=0, most=1)
    freeze: str | None = _option(
        None, 'model', 'what not to train: "backbone" (all but the classifier), or names of modules, with commas',
        metavar='NAMES')

    dataset_cache: str | None = _option(None, 'data', 'cache of a dataset of the Hub', metavar='DIR', free=True)
    train_split: str | None = _option(
        None, 'data', 'split to train on (default: found by its name, as train or Training)', metavar='NAME')
    val_split: str | None = _option(
        None, 'data', 'split to validate on (default: found by its name, as val or Validation)', metavar='NAME')
    val_fraction: float = _option(
        0.2, 'data', 'part of each class to validate on, if there is no split for it', least=0, most=1)
    check_images: bool = _option(
        True, 'data', 'start without checking the images; unreadable ones are skipped during training', free=True)
    img_size: int | None = _option(None, 'data', 'height and width in pixels (default: the model\'s)', least=1)
    crop_pct: float | None = _option(
        None, 'data', 'part of the image to validate on (default: the model\'s)', least=0, most=1)
    interpolation: str | None = _option(
        None, 'data', 'how images are resized, e.g. bicubic (default: the model\'s)',
        choices=('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'))
    mean: tuple[float, ...] | None = _option(
        None, 'data', 'means of the channels (default: the model\'s)', nargs='+')
    std: tuple[float, ...] | None = _option(
        None, 'data', 'standard deviations of the channels (default: the model\'s)', nargs='+')

    epochs: int = _option(5, 'optimization', 'epochs to train (default: 5; 6 for digits)', free=True, least=1)
    batch_size: int = _option(32, 'optimization', 'images in a batch, on each process', short='-b', least=1)
    grad_accum_steps: int = _option(1, 'optimization', 'batches whose gradients are added up for a step', least=1)
    opt: str = _option('adamw', 'optimization', 'optimizer of timm', metavar='NAME')
    lr: float = _option(
        1e-3, 'optimization', 'highest learning rate (default: 0.001; 0.002 with --no-pretrained)', least=0)
    attn_lr_scale: float = _option(
        1.0, 'optimization', 'factor of the attention\'s learning rate; more than 1 needs hundreds of steps, as the '
        'running statistics of later norms fall behind', least=0)
    weight_decay: float = _option(0.05, 'optimization', 'weight decay', least=0)
    layer_decay: float | None = _option(
        None, 'optimization', 'factor of the learning rate from each layer to the one before it', least=0, most=1)
    sched: str = _option(
        'cosine', 'optimization', 'learning rate schedule; step: divides the rate by 10 after each third of the epochs',
        choices=('cosine', 'tanh', 'step', 'constant', 'none'))
    warmup_epochs: float | None = _option(None, 'optimization', 'epochs of warm-up (default: a tenth of all)', least=0)
    min_lr: float = _option(0.0, 'optimization', 'learning rate at the end', least=0)
    clip_grad: float | None = _option(None, 'optimization', 'clip gradients to this norm', least=0)
    smoothing: float = _option(0.1, 'optimization', 'label smoothing', least=0, most=1)
    class_weights: str | None = _option(
        None, 'optimization', 'weights of the classes in the loss; balanced: the fewer images, the higher',
        choices=('balanced',))
    model_ema: bool = _option(False, 'optimization', 'average the weights over the steps, and keep the averages')
    model_ema_decay: float = _option(0.999, 'optimization', 'decay of the average of --model-ema', least=0, most=1)
    recompute_statistics: bool = _option(
        False, 'optimization', 'at the end, recompute the running statistics of the norms on the training images')
    patience: int | None = _option(None, 'optimization', 'stop after so many epochs without a better accuracy', least=1)

    scale: tuple[float, float] = _option(
        (0.35, 1.0), 'augmentation', 'smallest and largest part of the image to crop', nargs=2, metavar=('MIN', 'MAX'))
    hflip: float = _option(0.5, 'augmentation', 'probability of a mirror image', least=0, most=1)
    vflip: float = _option(0.0, 'augmentation', 'probability of an image upside down', least=0, most=1)
    color_jitter: float = _option(0.4, 'augmentation', 'change of brightness, contrast and saturation', least=0)
    aa: str | None = _option(
        None, 'augmentation', 'timm\'s AutoAugment policy, e.g. rand-m9-mstd0.5', metavar='POLICY')
    reprob: float = _option(0.0, 'augmentation', 'probability of random erasing', least=0, most=1)
    mixup: float = _option(0.0, 'augmentation', 'alpha of mixup', least=0)
    cutmix: float = _option(0.0, 'augmentation', 'alpha of CutMix', least=0)

    output: str | None = _option(None, 'run', 'folder to write (default: MODEL-DATA)', metavar='DIR', free=True)
    seed: int = _option(42, 'run', 'seed of all random numbers', least=0, most=2 ** 32 - 1)
    workers: int | None = _option(
        None, 'run', 'processes that read images (default: 4 with a GPU, else one for four CPUs, at most 4)',
        short='-j', free=True, least=0)
    amp: bool = _option(False, 'run', 'mixed precision')
    amp_dtype: str | None = _option(
        None, 'run', 'number type of --amp (default: bfloat16 on CPUs, float16 on GPUs)',
        choices=('float16', 'bfloat16'))
    device: str | None = _option(
        None, 'run', 'cpu, cuda, ... (default: a GPU if there is one)', metavar='DEVICE', free=True)
    sync_bn: bool = _option(False, 'run', 'compute norms over the images of all processes (GPUs only)')
    log_with: str | None = _option(
        None, 'run', 'also log the epochs there', choices=('tensorboard', 'wandb'), free=True)
    extend: bool = _option(False, 'run', 'continue a finished run with more --epochs', free=True)
    force: bool = _option(False, 'run', 'replace an earlier run in the folder', free=True)

    @classmethod
    def suited(cls, data: str, **given: Any) -> 'Settings':
        """Settings with defaults that suit the data and the weights to start from."""
        from timm_eca.images.sources import is_digits
        suited: dict[str, Any] = {'lr': 1e-3 if given.get('pretrained', True) else 2e-3}
        return cls(data, **suited | (_DIGITS_SETTINGS if is_digits(data) else {}) | given)

    @property
    def model_args(self) -> dict[str, Any]:
        """The values of `model_kwargs` by name, read as timm's scripts do."""
        from timm.utils import ParseKwargs  # imports torch
        found, given = Namespace(), self.model_kwargs or ()
        try:
            ParseKwargs([], 'values')(None, found, given)
        except ValueError as e:
            raise FinetuneError(f'--model-kwargs {" ".join(given)} is not possible', 'give NAME=VALUE') from e
        return found.values

    def check(self) -> None:
        """Raises a FinetuneError if a value is not possible. Nothing is read."""
        from timm.optim import list_optimizers  # takes seconds to import
        for option in fields(self):
            value, least, most = getattr(self, option.name), *map(option.metadata.get, ('least', 'most'))
            if value is not None and least is not None and not least <= value <= (math.inf if most is None else most):
                limits = f'{least} or more' if most is None else f'{least} to {most}'
                raise FinetuneError(f'{flag(option.name)} {value} is not possible', f'give {limits}')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise FinetuneError(f'Mixup and CutMix can\'t take --batch-size {self.batch_size}', 'give an even number')
        if self.recompute_statistics and self.freeze:
            raise FinetuneError('--recompute-statistics would change frozen norms', 'leave out --freeze')
        reasons = [reason for pattern, reason in _OTHER_OPTIMIZERS.items() if fnmatch(self.opt, pattern)]
        optimizers = list_optimizers(exclude_filters=list(_OTHER_OPTIMIZERS))
        if self.opt not in optimizers:
            similar = get_close_matches(self.opt, optimizers) or ['adamw', 'sgd', 'lamb']
            raise FinetuneError(
                f'--opt {self.opt} is not possible ({reasons[0] if reasons else "timm has no such optimizer"})',
                f'give another, such as {", ".join(similar)}')
        _ = self.model_args


def flag(name: str) -> str:
    """The command's option for a setting."""
    return '--' + name.replace('_', '-')


def as_option(name: str, value: Any) -> str:
    """A setting that is not the default as in a command: `--freeze backbone`, `--no-ema`."""
    if isinstance(value, bool):
        return flag(name) if value else f'--no-{flag(name)[2:]}'
    return f'{flag(name)} {shlex.join(map(str, value if isinstance(value, tuple) else [value]))}'
