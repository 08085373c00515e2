"""What a fine-tuning run is told: the options of `timm-eca finetune`, under the names that timm's `train.py` has."""
import math
from dataclasses import dataclass, field
from typing import Any

from timm.optim import list_optimizers

from timm_eca.errors import TimmEcaError

__all__ = ['FinetuneError', 'Settings', 'flag']


class FinetuneError(TimmEcaError, ValueError):
    """A run that can't start or go on; says what to do about it."""


def _option(group: str, help: str, default: Any = None, metavar: str | None = None, choices: Any = None) -> Any:
    return field(default=default, metadata={'group': group, 'help': help, 'metavar': metavar, 'choices': choices})


@dataclass(frozen=True)
class Settings:
    """What a run does. The groups and words beside each are those of the command's help.

    Where the default is None and the type is not, the data decides or a default that the words name.
    """
    data: str
    model: str = field(metadata={
        'group': 'model', 'help': 'name of a registered model, hf-hub:ORGANISATION/NAME or local-dir:FOLDER',
        'metavar': None, 'choices': None})
    output: str = _option('run', 'the folder to make (default: MODEL-DATA)', '', metavar='DIR')

    checkpoint: str | None = _option(
        'model', 'weights to start from: a file or a folder; those without ECA are a warm start', metavar='PATH')
    ema: bool = _option('model', 'of a checkpoint that has averaged weights (EMA), too, start from the last ones', True)
    pretrained: bool = _option('model', 'start from random weights instead of pretrained ones', True)
    in_chans: int = _option('model', 'channels of the images, 1 or 3', 3)
    drop: float | None = _option('model', 'dropout rate before the classifier')
    drop_path: float | None = _option('model', 'drop path rate')
    freeze: str | None = _option(
        'model', '"backbone" for all but the classifier, or names of modules, with commas between', metavar='NAMES')

    data_dir: str | None = _option('data', 'root folder, or cache, of a dataset that is named', metavar='DIR')
    train_split: str = _option('data', 'name of the split to train on', 'train', metavar='NAME')
    val_split: str = _option('data', 'name of the split to validate on', 'validation', metavar='NAME')
    val_fraction: float = _option('data', 'part of each class to validate on where there is no split for it', 0.2)
    num_classes: int | None = _option('data', 'number of classes of a dataset that doesn\'t say it')
    dataset_download: bool = _option('data', 'download a dataset that is named', False)
    check_images: bool = _option('data', 'don\'t read every image before training starts', True)
    img_size: int | None = _option('data', 'height and width in pixels (default: the model\'s)')
    crop_pct: float | None = _option('data', 'part of the image that is validated on (default: the model\'s)')
    interpolation: str | None = _option('data', 'of resized images (default: the model\'s)', metavar='NAME')
    mean: tuple[float, ...] | None = _option('data', 'means of the channels (default: the model\'s)')
    std: tuple[float, ...] | None = _option('data', 'standard deviations of the channels (default: the model\'s)')

    epochs: int = _option('optimization', 'epochs to train (default: 5, of digits 10)')
    batch_size: int = _option('optimization', 'images of a step, on each process', 32)
    grad_accum_steps: int = _option('optimization', 'batches whose gradients are added up for a step', 1)
    opt: str = _option('optimization', 'optimizer, one of timm\'s', 'adamw', metavar='NAME')
    lr: float = _option('optimization', 'learning rate at its highest (default: 0.001, from nothing 0.002)')
    weight_decay: float = _option('optimization', 'weight decay', 0.05)
    layer_decay: float | None = _option('optimization', 'factor of the learning rate from each layer to the one below')
    sched: str = _option('optimization', 'learning rate schedule, one of timm\'s', 'cosine', metavar='NAME')
    warmup_epochs: float | None = _option('optimization', 'epochs of warm-up (default: a tenth of all)')
    min_lr: float = _option('optimization', 'learning rate at the end', 0.0)
    clip_grad: float | None = _option('optimization', 'norm that gradients are clipped to')
    smoothing: float = _option('optimization', 'label smoothing', 0.1)
    class_weights: str | None = _option(
        'optimization', '"balanced", or the weights of the classes in the loss, with commas between', metavar='WEIGHTS')
    model_ema: bool = _option('optimization', 'average the weights over the steps, and keep the averages', False)
    model_ema_decay: float = _option('optimization', 'decay of that average', 0.999)
    patience: int | None = _option('optimization', 'stop after so many epochs without a better accuracy')

    scale: tuple[float, float] = _option(
        'augmentation', 'lowest and highest part of the image that is cropped (default: 0.35 1.0)')
    hflip: float = _option('augmentation', 'probability of a mirror image (default: 0.5)')
    vflip: float = _option('augmentation', 'probability of an image upside down', 0.0)
    color_jitter: float = _option(
        'augmentation', 'change of brightness, contrast and saturation (default: 0.4)')
    aa: str | None = _option('augmentation', 'timm\'s AutoAugment policy, e.g. rand-m9-mstd0.5', metavar='POLICY')
    reprob: float = _option('augmentation', 'probability of random erasing', 0.0)
    mixup: float = _option('augmentation', 'alpha of mixup', 0.0)
    cutmix: float = _option('augmentation', 'alpha of CutMix', 0.0)

    seed: int = _option('run', 'seed of everything random', 42)
    workers: int = _option(
        'run', 'processes that read images (default: 4, or a quarter of the cores where these train as well)')
    amp: str | None = _option('run', 'mixed precision (default: accelerate\'s setting)', choices=('no', 'fp16', 'bf16'))
    cpu: bool = _option('run', 'train on the CPU where there is a GPU, too', False)
    sync_bn: bool = _option('run', 'norms over the images of all processes (GPUs only)', False)
    resume: bool = _option('run', 'continue a run that was interrupted', False)
    force: bool = _option('run', 'replace what an earlier run left in the folder', False)

    def check(self) -> None:
        """Raises a FinetuneError for what makes no sense, before anything is read."""
        least = {
            'epochs': 1, 'batch_size': 1, 'grad_accum_steps': 1, 'patience': 1, 'workers': 0, 'img_size': 1, 'lr': 0,
            'weight_decay': 0, 'min_lr': 0, 'warmup_epochs': 0, 'mixup': 0, 'cutmix': 0, 'color_jitter': 0,
            'num_classes': 2, 'seed': 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (bound <= value < math.inf):
                raise FinetuneError(f'{flag(name)} {value} makes no sense: give {bound} or more.')
        for name in ('smoothing', 'hflip', 'vflip', 'reprob', 'drop', 'drop_path', 'model_ema_decay', 'crop_pct'):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise FinetuneError(f'{flag(name)} {value} makes no sense: give a number from 0 to 1.')
        for name in ('val_fraction', 'layer_decay'):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise FinetuneError(f'{flag(name)} {value} makes no sense: give a number between 0 and 1.')
        if self.scale is not None and not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise FinetuneError(f'--scale {self.scale} makes no sense: give two numbers up to 1, the lower first.')
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise FinetuneError(f'--std {self.std} makes no sense: give positive numbers.')
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise FinetuneError(f'--mean {self.mean} makes no sense: give numbers.')
        if self.sched == 'plateau':
            raise FinetuneError('--sched plateau, which timm gives up, can\'t be continued: choose cosine, step, ...')
        if self.opt not in list_optimizers():
            raise FinetuneError(f'timm has no optimizer {self.opt!r}: choose one of {", ".join(list_optimizers())}.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise FinetuneError(f'Mixup and CutMix need an even --batch-size, not {self.batch_size}.')


def flag(name: str) -> str:
    """The option of a setting."""
    return '--' + name.replace('_', '-')
