"""The settings of a fine-tuning run: the options of `timm-eca finetune`. An option of timm's `train.py` has its name.

This module imports nothing heavy: the command line reads it to show its help.
"""
import ast
import math
import shlex
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from timm_eca.errors import TimmEcaError
from timm_eca.images.digits import is_digits

__all__ = ['FinetuneError', 'Settings', 'as_option', 'flag']

T = TypeVar('T')

# For grey images of digits: no mirror images, nearly all of the image, no change of grey.
_DIGITS_SETTINGS: dict[str, Any] = {
    'epochs': 6, 'img_size': 24, 'hflip': 0.0, 'scale': (0.8, 1.0), 'color_jitter': 0.0, 'crop_pct': 1.0}
# Optimizers of timm that need a GPU, or other packages, or second derivatives. Without opt_einsum, kron* need 110 GB.
_OTHER_OPTIMIZERS = ['fused*', 'bnb*', 'kron*', 'adahessian']


class FinetuneError(TimmEcaError, ValueError):
    """A run that can't start or continue."""


def _option(default: T, group: str, help: str, **argument: Any) -> T:
    """A setting with its group and its text in the command's help, and further arguments of `add_argument`.

    `least` or `above`, and `most` are its bounds. With `free=True` it may differ when a run continues.
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
        True, 'data', 'don\'t read all images before training. Bad images are then skipped during training', free=True)
    img_size: int | None = _option(None, 'data', 'height and width in pixels (default: the model\'s)', least=1)
    crop_pct: float | None = _option(
        None, 'data', 'part of the image to validate on (default: the model\'s)', above=0, most=1)
    interpolation: str | None = _option(None, 'data', 'of resized images (default: the model\'s)', metavar='NAME')
    mean: tuple[float, ...] | None = _option(
        None, 'data', 'means of the channels (default: the model\'s)', nargs='+')
    std: tuple[float, ...] | None = _option(
        None, 'data', 'standard deviations of the channels (default: the model\'s)', nargs='+')

    epochs: int = _option(5, 'optimization', 'epochs to train, for digits 6', free=True, least=1)
    batch_size: int = _option(32, 'optimization', 'images in a batch, on each process', short='-b', least=1)
    grad_accum_steps: int = _option(1, 'optimization', 'batches whose gradients are added up for a step', least=1)
    opt: str = _option(
        'adamw', 'optimization', 'optimizer of timm', metavar='NAME')
    lr: float = _option(1e-3, 'optimization', 'highest learning rate, from random weights 0.002', least=0)
    attn_lr_scale: float = _option(
        1.0, 'optimization', 'factor of the attention\'s learning rate. More than 1 needs hundreds of steps: fast '
        'gates leave the running statistics of later norms behind', least=0)
    weight_decay: float = _option(0.05, 'optimization', 'weight decay', least=0)
    layer_decay: float | None = _option(
        None, 'optimization', 'factor of the learning rate from each layer to the one before it', least=0, most=1)
    sched: str = _option(
        'cosine', 'optimization', 'learning rate schedule; step: a tenth after each third of the epochs',
        choices=('cosine', 'tanh', 'step', 'constant', 'none'))
    warmup_epochs: float | None = _option(None, 'optimization', 'epochs of warm-up (default: a tenth of all)', least=0)
    min_lr: float = _option(0.0, 'optimization', 'learning rate at the end', least=0)
    clip_grad: float | None = _option(None, 'optimization', 'clip gradients to this norm', above=0)
    smoothing: float = _option(0.1, 'optimization', 'label smoothing', least=0, most=1)
    class_weights: str | None = _option(
        None, 'optimization', 'weights of the classes in the loss; balanced: the fewer images, the higher',
        choices=('balanced',))
    model_ema: bool = _option(False, 'optimization', 'average the weights over the steps, and keep the averages')
    recompute_statistics: bool = _option(
        False, 'optimization', 'at the end, recompute the running statistics of the norms on the training images')
    model_ema_decay: float = _option(0.999, 'optimization', 'decay of that average', least=0, most=1)
    patience: int | None = _option(None, 'optimization', 'stop after so many epochs without a better accuracy', least=1)

    scale: tuple[float, float] = _option(
        (0.35, 1.0), 'augmentation', 'smallest and largest part of the image to crop', nargs=2)
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
        None, 'run', 'its type (default: bfloat16 on CPUs, float16 on GPUs)', choices=('float16', 'bfloat16'))
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
        suited: dict[str, Any] = {'lr': 1e-3 if given.get('pretrained', True) else 2e-3}
        return cls(data, **suited | (_DIGITS_SETTINGS if is_digits(data) else {}) | given)

    def written(self) -> dict[str, Any]:
        """What has to stay the same when a run continues."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get('free')}

    @property
    def model_args(self) -> dict[str, Any]:
        """The values of `model_kwargs` by name. As in timm, a value that is no Python literal is a string.

        Raises:
            FinetuneError: An entry has no `=`.
        """
        found: dict[str, Any] = {}
        for entry in self.model_kwargs or ():
            name, equals, value = entry.partition('=')
            if not equals or not name.isidentifier():
                raise FinetuneError(f'--model-kwargs {entry} is not possible', 'give NAME=VALUE')
            try:
                found[name] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                found[name] = value
        return found

    def check(self) -> None:
        """Checks the values before anything is read.

        Raises:
            FinetuneError: A value is not possible.
        """
        from timm.optim import list_optimizers  # takes seconds to import
        for option in fields(self):
            value, bounds = getattr(self, option.name), option.metadata
            if value is None or not {'least', 'above'} & bounds.keys():
                continue
            most = bounds.get('most', math.inf)
            if not (value > bounds['above'] if 'above' in bounds else value >= bounds['least']) or value > most or (
                    value == math.inf):
                low = f'more than {bounds["above"]}' if 'above' in bounds else f'{bounds["least"]} or more'
                high = '' if most == math.inf else f', and {most} at most'
                raise FinetuneError(f'{flag(option.name)} {value} is not possible', f'give {low}{high}')
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise FinetuneError(
                f'--scale {self.scale[0]} {self.scale[1]} is not possible', 'give two numbers up to 1, the lower first')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise FinetuneError(f'Mixup and CutMix can\'t take --batch-size {self.batch_size}', 'give an even number')
        if self.recompute_statistics and self.freeze:
            raise FinetuneError('--recompute-statistics would change frozen norms', 'leave out --freeze')
        optimizers = list_optimizers(exclude_filters=_OTHER_OPTIMIZERS)
        if self.opt not in optimizers:
            similar = get_close_matches(self.opt, optimizers) or ['adamw', 'sgd', 'lamb']
            raise FinetuneError(f'--opt {self.opt} is not possible', f'give another, such as {", ".join(similar)}')
        _ = self.model_args


def flag(name: str) -> str:
    """The command's option for a setting."""
    return '--' + name.replace('_', '-')


def as_option(name: str, value: Any) -> str:
    """A setting as in a command: `--freeze backbone`, `--no-ema`, or `no --freeze` for None."""
    default = Settings.__dataclass_fields__[name].default
    if isinstance(value, bool):
        option = f'--no-{flag(name)[2:]}' if default else flag(name)
        return option if value != default else f'no {option}'
    values = value if isinstance(value, list | tuple) else [value]
    return f'no {flag(name)}' if value is None else f'{flag(name)} {" ".join(shlex.quote(str(v)) for v in values)}'
