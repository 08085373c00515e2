"""The settings of a fine-tuning run: the options of `timm-eca finetune`, under the names that timm's `train.py` has."""
import math
import os
import shlex
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from timm.optim import list_optimizers

from timm_eca.errors import TimmEcaError
from timm_eca.finetune.data import DIGITS, DIGITS_SETTINGS

__all__ = ['FinetuneError', 'Settings', 'as_option', 'flag']

T = TypeVar('T')


class FinetuneError(TimmEcaError, ValueError):
    """A run that can't start or go on; says what to do about it."""


def _option(default: T, group: str, help: str, **argument: Any) -> T:
    """A setting with its group and its words in the command's help, and what `add_argument` is to get besides.

    Its type and default are those of the field, `least` or `above`, and `most` its bounds. With `free=True` it may
    differ when a run is resumed.
    """
    return field(default=default, metadata={'group': group, 'help': help, **argument})


@dataclass(frozen=True)
class Settings:
    """What a run does. None leaves it to the model, or leaves it out."""
    data: str
    model: str = field(metadata={
        'group': 'model', 'help': 'name of a registered model, hf-hub:ORGANISATION/NAME, or a folder'})

    initial_checkpoint: str | None = _option(
        None, 'model', 'weights to start from: a file or a folder; those without ECA are a warm start', metavar='PATH')
    ema: bool = _option(
        True, 'model', 'of a checkpoint that has averaged weights (EMA), too, start from the last ones')
    pretrained: bool = _option(True, 'model', 'start from random weights instead of pretrained ones')
    in_chans: int = _option(3, 'model', 'channels of the images, 1 or 3')
    drop: float | None = _option(None, 'model', 'dropout rate before the classifier', least=0, most=1)
    drop_path: float | None = _option(None, 'model', 'drop path rate', least=0, most=1)
    freeze: str | None = _option(
        None, 'model', '"backbone" for all but the classifier, or names of modules, with commas between',
        metavar='NAMES')

    data_dir: str | None = _option(None, 'data', 'cache of a dataset of the Hub', metavar='DIR', free=True)
    train_split: str = _option('train', 'data', 'split to train on', metavar='NAME')
    val_split: str = _option('validation', 'data', 'split to validate on', metavar='NAME')
    val_fraction: float = _option(
        0.2, 'data', 'part of each class to validate on where there is no split for it', least=0, most=1)
    check_images: bool = _option(
        True, 'data', 'don\'t read all images before training: skip what can\'t be read when its turn comes', free=True)
    img_size: int | None = _option(None, 'data', 'height and width in pixels (default: the model\'s)', least=1)
    crop_pct: float | None = _option(
        None, 'data', 'part of the image to validate on (default: the model\'s)', above=0, most=1)
    interpolation: str | None = _option(None, 'data', 'of resized images (default: the model\'s)', metavar='NAME')
    mean: tuple[float, ...] | None = _option(
        None, 'data', 'means of the channels (default: the model\'s)', nargs='+')
    std: tuple[float, ...] | None = _option(
        None, 'data', 'standard deviations of the channels (default: the model\'s)', nargs='+')

    epochs: int = _option(5, 'optimization', 'epochs to train; of digits 10', free=True, least=1)
    batch_size: int = _option(32, 'optimization', 'images of a batch, on each process', short='-b', least=1)
    grad_accum_steps: int = _option(1, 'optimization', 'batches whose gradients are added up for a step', least=1)
    opt: str = _option(
        'adamw', 'optimization', 'optimizer, one of timm\'s', metavar='NAME',
        choices=tuple(list_optimizers(exclude_filters=['fused*', 'bnb*'])))  # which need other packages and a GPU
    lr: float = _option(1e-3, 'optimization', 'highest learning rate; from random weights 0.002', least=0)
    attn_lr_scale: float = _option(
        1.0, 'optimization', 'factor of the attention\'s learning rate. More than 1 needs hundreds of steps: fast gates '
        'leave the running statistics of later norms behind', least=0)
    weight_decay: float = _option(0.05, 'optimization', 'weight decay', least=0)
    layer_decay: float | None = _option(
        None, 'optimization', 'factor of the learning rate from each layer to the one before it', least=0, most=1)
    sched: str = _option(
        'cosine', 'optimization', 'learning rate schedule; step: a tenth after each third of the epochs',
        choices=('cosine', 'tanh', 'step', 'constant', 'none'))
    warmup_epochs: float | None = _option(None, 'optimization', 'epochs of warm-up (default: a tenth of all)', least=0)
    min_lr: float = _option(0.0, 'optimization', 'learning rate at the end', least=0)
    clip_grad: float | None = _option(None, 'optimization', 'norm that gradients are clipped to', above=0)
    smoothing: float = _option(0.1, 'optimization', 'label smoothing', least=0, most=1)
    class_weights: str | None = _option(
        None, 'optimization', 'weights of the classes in the loss: the fewer images, the higher', choices=('balanced',))
    model_ema: bool = _option(False, 'optimization', 'average the weights over the steps, and keep the averages')
    model_ema_decay: float = _option(0.999, 'optimization', 'decay of that average', least=0, most=1)
    patience: int | None = _option(None, 'optimization', 'stop after so many epochs without a better accuracy', least=1)

    scale: tuple[float, float] = _option(
        (0.35, 1.0), 'augmentation', 'lowest and highest part of the image that is cropped', nargs=2)
    hflip: float = _option(0.5, 'augmentation', 'probability of a mirror image', least=0, most=1)
    vflip: float = _option(0.0, 'augmentation', 'probability of an image upside down', least=0, most=1)
    color_jitter: float = _option(0.4, 'augmentation', 'change of brightness, contrast and saturation', least=0)
    aa: str | None = _option(
        None, 'augmentation', 'timm\'s AutoAugment policy, e.g. rand-m9-mstd0.5', metavar='POLICY')
    reprob: float = _option(0.0, 'augmentation', 'probability of random erasing', least=0, most=1)
    mixup: float = _option(0.0, 'augmentation', 'alpha of mixup', least=0)
    cutmix: float = _option(0.0, 'augmentation', 'alpha of CutMix', least=0)

    output: str | None = _option(None, 'run', 'folder to make (default: MODEL-DATA)', metavar='DIR', free=True)
    seed: int = _option(42, 'run', 'seed of everything random', least=0)
    workers: int = _option(
        4 if torch.accelerator.is_available() else min(4, (os.cpu_count() or 1) // 4), 'run',
        'processes that read images', short='-j', free=True, least=0)
    amp: bool = _option(False, 'run', 'mixed precision')
    amp_dtype: str | None = _option(
        None, 'run', 'its type (default: bfloat16 on CPUs, float16 on GPUs)', choices=('float16', 'bfloat16'))
    device: str | None = _option(
        None, 'run', 'cpu, cuda, ... (default: a GPU where there is one)', metavar='DEVICE', free=True)
    sync_bn: bool = _option(False, 'run', 'norms over the images of all processes (GPUs only)')
    log_with: str | None = _option(
        None, 'run', 'log the epochs there, too', choices=('tensorboard', 'wandb'), free=True)
    resume: bool = _option(False, 'run', 'continue a finished run with more --epochs', free=True)
    force: bool = _option(False, 'run', 'replace what an earlier run left in the folder', free=True)

    @classmethod
    def suited(cls, data: str, **given: Any) -> 'Settings':
        """The settings given, the others as they suit the data and the weights that the run starts from."""
        suited: dict[str, Any] = {'lr': 1e-3 if given.get('pretrained', True) else 2e-3}
        return cls(data, **suited | (DIGITS_SETTINGS if data == DIGITS else {}) | given)

    def written(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get('free')}

    def check(self) -> None:
        """Raises a FinetuneError for values that are not possible, before anything is read."""
        for option in fields(self):
            value, bounds = getattr(self, option.name), option.metadata
            if value is None or not {'least', 'above'} & bounds.keys():
                continue
            most = bounds.get('most', math.inf)
            if not (value > bounds['above'] if 'above' in bounds else value >= bounds['least']) or value > most or (
                    value == math.inf):
                low = f'more than {bounds["above"]}' if 'above' in bounds else f'{bounds["least"]} or more'
                high = '' if most == math.inf else f', and {most} at most'
                raise FinetuneError(f'{flag(option.name)} {value} is not possible: give {low}{high}.')
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise FinetuneError(f'--scale {self.scale} is not possible: give two numbers up to 1, the lower first.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise FinetuneError(f'Mixup and CutMix need an even --batch-size, not {self.batch_size}.')


def flag(name: str) -> str:
    """The option of a setting."""
    return '--' + name.replace('_', '-')


def as_option(name: str, value: Any) -> str:
    """How a setting is given on the command line: `--freeze backbone`, `--no-ema`, or `no --freeze` for None."""
    default = Settings.__dataclass_fields__[name].default
    if isinstance(value, bool):
        option = f'--no-{flag(name)[2:]}' if default else flag(name)
        return option if value != default else f'no {option}'
    values = value if isinstance(value, list | tuple) else [value]
    return f'no {flag(name)}' if value is None else f'{flag(name)} {" ".join(shlex.quote(str(v)) for v in values)}'
