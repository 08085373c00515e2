"""Trains a model: a loop on accelerate's devices and processes, with timm's parts."""
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import Mixup, create_loader, create_transform, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch.optim.swa_utils import update_bn

from timm_eca.analysis.evaluate import Evaluation, classify
from timm_eca.analysis.gates import has_eca
from timm_eca.analysis.gates_report import collect_gates, describe_gates
from timm_eca.errors import TimmEcaError, first_line
from timm_eca.finetune.examples import Examples
from timm_eca.finetune.settings import FinetuneError, Settings
from timm_eca.images.batches import read_batches
from timm_eca.images.channels import by_channel
from timm_eca.images.reader import image_mode
from timm_eca.images.sources import Sources
from timm_eca.models.param_groups import param_groups

__all__ = ['Trainer', 'on_main']

T = TypeVar('T')
_logger = logging.getLogger(__name__)
_GATE_IMAGES = 1000  # about as many are enough to describe the channel weights


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Runs a function on the first process. All processes return its result.

    Raises:
        FinetuneError: The function raised a TimmEcaError or an OSError. After any other error, only the other processes
            raise this, so that they don't wait.
    """
    told: list[Any] = [None, ('The first process ended with an error', 'look at its output')]
    try:
        if accelerator.is_main_process:
            told = [function(), None]
    except TimmEcaError as e:
        told[1] = (e.problem, *e.fixes)
        raise
    except OSError as e:
        told[1] = (
            f'{e.filename or "The output"} can\'t be written ({e.strerror or first_line(e)})',
            'make room, or name another --output')
        raise FinetuneError(*told[1]) from e
    finally:
        broadcast_object_list(told)
    if told[1] is not None:
        raise FinetuneError(*told[1])
    return told[0]


class Trainer:
    """Trains a model and validates it."""

    def __init__(
            self,
            accelerator: Accelerator,
            settings: Settings,
            model: nn.Module,
            data: Sources,
            workers: int,
    ) -> None:
        self.accelerator, self.settings, self.data, self.workers = accelerator, settings, data, workers
        self.rows: list[dict[str, float]] = []  # of metrics.csv
        self.planned: list[int] = []  # the --epochs that each was trained under
        self.updates = 0
        self.saved = 0  # the last epoch in the state file
        self.best_weights: dict[str, torch.Tensor] = {}
        if settings.sync_bn:  # before anything refers to the norms
            model = convert_sync_batchnorm(model)
        self.frozen = _freeze(model, settings.freeze)
        # Faster on CPUs, and on GPUs in mixed precision.
        model.to(accelerator.device).to(memory_format=torch.channels_last)
        self.network = model
        self.data_config = _data_config(settings, model)
        self.mixup = Mixup(
            settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=len(data.class_names),
        ) if settings.mixup or settings.cutmix else None
        self.train_loader = self._make_loader()
        updates_per_epoch = math.ceil(len(self.train_loader) / settings.grad_accum_steps)

        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, param_group_fn=partial(
                param_groups, lr=settings.lr, weight_decay=settings.weight_decay,
                attn_lr_scale=settings.attn_lr_scale, layer_decay=settings.layer_decay))
        warmup_epochs = settings.epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
        if warmup_epochs * updates_per_epoch < 2:  # a warm-up of one step would be that step lost
            warmup_epochs = 0
        self.scheduler, _ = create_scheduler_v2(
            optimizer, sched=settings.sched, num_epochs=settings.epochs, min_lr=settings.min_lr,
            warmup_lr=settings.lr / 100, warmup_epochs=warmup_epochs, decay_epochs=max(1, settings.epochs / 3),
            step_on_epochs=False, updates_per_epoch=updates_per_epoch)
        self.ema = ModelEmaV3(model, decay=settings.model_ema_decay, use_warmup=True) if settings.model_ema else None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        weights = None
        if settings.class_weights == 'balanced':
            counts = torch.bincount(torch.tensor(data.train.labels), minlength=len(data.class_names))
            weights = len(data.train) / (len(counts) * counts.float())
        self.loss = nn.CrossEntropyLoss(weights, label_smoothing=settings.smoothing).to(accelerator.device)
        # The network to validate and to keep: with EMA, the one with the averages.
        self.kept = model if self.ema is None else self.ema.module

    def describe(self, start: str) -> None:
        """Reports the model, the weights that it starts from, and the images."""
        data, parameters = self.data, list(self.network.parameters())
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        self.accelerator.print(
            f'{self.settings.model}: {total:,} parameters, {trained:,} of them trained, from {start}\n'
            f'{data.name}: {len(data.train):,} images to train on, {len(data.val):,} to validate on, '
            f'{len(data.class_names)} classes, {"x".join(map(str, self.data_config["input_size"][1:]))} pixels')

    def _make_loader(self) -> Any:
        settings, config, accelerator = self.settings, self.data_config, self.accelerator
        if settings.aa is not None:
            _check_policy(settings.aa, config)
        self.batch_size = min(settings.batch_size, len(self.data.train) // accelerator.num_processes)
        if self.mixup is not None:
            self.batch_size -= self.batch_size % 2
        if not self.batch_size:
            raise FinetuneError(
                f'{len(self.data.train)} images to train on are too few', 'add images, or leave out processes or Mixup')
        return accelerator.prepare_data_loader(create_loader(
            Examples(self.data.train), batch_size=self.batch_size, is_training=True, scale=settings.scale,
            hflip=settings.hflip, vflip=settings.vflip, color_jitter=settings.color_jitter, auto_augment=settings.aa,
            re_prob=settings.reprob, use_prefetcher=False, num_workers=self.workers, persistent_workers=False,
            pin_memory=accelerator.device.type == 'cuda', **config))

    @property
    def best(self) -> dict[str, float]:
        """The row with the highest accuracy. Among equals the lowest loss decides, then the first epoch."""
        return min(self.rows, key=lambda row: (-row['top1'], row['loss'], row['epoch']))

    def run(self, save: Callable[[dict[str, Any]], None]) -> None:
        """Trains the remaining epochs, and calls `save` with the state after each."""
        settings = self.settings
        top5 = '   top-5' if len(self.data.class_names) > 5 else ''
        self.accelerator.print(f'epoch  learning rate  train loss  val loss   top-1{top5}  seconds')
        for row in self.rows:
            self.accelerator.print(_format(row))
        for epoch in range(len(self.rows) + 1, settings.epochs + 1):
            if self.is_stalled:
                self.accelerator.print(f'Stopped early: no better accuracy in {settings.patience} epochs.')
                break
            # Each epoch has its own seed, so a run that continues sees the same images in the same order.
            set_seed((settings.seed * 100_003 + epoch) % 2 ** 32, device_specific=True)
            started = time.monotonic()
            try:
                trained = self._train(epoch)
            except ValueError as e:
                if self.batch_size > 1:
                    raise
                raise FinetuneError(
                    f'Batches of one image can\'t be trained on ({first_line(e)})',
                    'give a higher --batch-size or --img-size') from e
            row = {'epoch': epoch, **trained, **self.evaluate(self.kept).metrics}
            row['seconds'] = round(time.monotonic() - started, 1)
            self.rows.append(row)
            self.planned.append(settings.epochs)
            if self.best is row:
                self.best_weights = {key: value.detach().cpu().clone() for key, value in self.kept.state_dict().items()}
            on_main(self.accelerator, lambda: save(self._state()))
            self.saved = epoch
            self.accelerator.print(_format(row))
            self.accelerator.log(row, step=epoch)

    @property
    def is_stalled(self) -> bool:
        """Whether the last `patience` epochs brought no better accuracy."""
        patience, accuracies = self.settings.patience, [row['top1'] for row in self.rows]
        return patience is not None and len(accuracies) > patience and (
            max(accuracies[-patience:]) <= max(accuracies[:-patience]))

    def _state(self) -> dict[str, Any]:
        """All that the next epochs need. The random numbers of an epoch follow from the seed."""
        return {
            'rows': self.rows, 'planned': self.planned, 'updates': self.updates, 'best_weights': self.best_weights,
            'parts': {name: part.state_dict() for name, part in self._parts().items()},
        }

    def _parts(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler  # of float16
        parts = {'network': self.network, 'optimizer': self.optimizer, 'ema': self.ema, 'scaler': scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def resume(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        self.rows, self.planned, self.saved = state['rows'], state['planned'], len(state['rows'])
        self.updates, self.best_weights = state['updates'], state['best_weights']
        for name, part in self._parts().items():
            part.load_state_dict(state['parts'][name])
        if self.scheduler is not None:  # its rates follow from the steps and from --epochs, which may have changed
            self.scheduler.step_update(self.updates)
        self.accelerator.print(
            f'Continuing after epoch {self.saved}, at a learning rate of {self.optimizer.param_groups[-1]["lr"]:.2e}.')
        if self.planned[-1] != self.settings.epochs:
            self.accelerator.print(
                f'The schedule is now that of {self.settings.epochs} epochs instead of {self.planned[-1]}, as if '
                'planned from the start.')

    def _train(self, epoch: int) -> dict[str, float]:
        """Trains an epoch, and returns its mean learning rate (the classifier's) and its mean loss."""
        accelerator, settings = self.accelerator, self.settings
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.train_loader.set_epoch(epoch)
        steps, batches = settings.grad_accum_steps, len(self.train_loader)
        last = batches % steps or steps  # batches in the last step
        total, rates = torch.zeros(2, device=accelerator.device), []
        bar, told = self._bar(self.train_loader, f'epoch {epoch}/{settings.epochs}'), time.monotonic()
        for index, (images, targets) in enumerate(bar):
            images = images.contiguous(memory_format=torch.channels_last)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.loss(self.model(images), targets)
                # accelerate divides by the batches of a step, but the last step may have fewer.
                accelerator.backward(loss * (steps / last) if index >= batches - last else loss)
                if accelerator.sync_gradients and settings.clip_grad is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(self.optimizer.param_groups[-1]['lr'])  # the classifier's
                self.updates += 1
                if self.scheduler is not None:
                    self.scheduler.step_update(self.updates)
                if self.ema is not None:
                    self.ema.update(self.network, self.updates)
            total += torch.stack([loss.detach() * len(images), loss.new_tensor(len(images))])
            if time.monotonic() - told >= (60 if bar.disable else 1):  # seldom: it waits for the GPU
                told, running = time.monotonic(), f'loss {float(total[0] / total[1]):.4f}'
                bar.set_postfix_str(running, refresh=False)
                if bar.disable:
                    self.accelerator.print(f'epoch {epoch}: {index + 1:,} of {batches:,} batches, {running}')
        self._share_statistics(self.network, *([self.ema.module] if self.ema is not None else []))
        total = accelerator.reduce(total)
        value = float(total[0] / total[1])
        if not math.isfinite(value):
            raise FinetuneError(f'The loss is not finite in epoch {epoch}', 'lower --lr, or leave out --amp')
        return {'lr': sum(rates) / len(rates), 'train_loss': value}

    def _share_statistics(self, *networks: nn.Module) -> None:
        """Averages the running statistics over the processes."""
        if self.accelerator.num_processes > 1:
            for network in networks:
                distribute_bn(network, self.accelerator.num_processes, reduce=True)

    def recompute_statistics(self) -> None:
        """Computes the running statistics of the norms again, in one pass over the training images."""
        set_seed(self.settings.seed, device_specific=True)
        self.train_loader.set_epoch(0)
        with self.accelerator.autocast():
            update_bn(self._bar(self.train_loader, 'recomputing statistics'), self.network, self.accelerator.device)
        self._share_statistics(self.network)

    def _bar(self, batches: Any, text: str) -> tqdm:
        """A progress bar on the first process, if it has a terminal."""
        return tqdm(batches, text, leave=False, disable=None if self.accelerator.is_main_process else True)

    def evaluate(self, network: nn.Module) -> Evaluation:
        """Validates, each process on its part of the images. Images that can't be read don't count."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        part = self.data.val.part(range(rank, len(self.data.val), processes))
        unreadable: list[str] = []
        batches = read_batches(network, part, 2 * self.batch_size, unreadable, self.workers, self.data_config)
        results = classify(
            network, ((images, torch.tensor(labels)) for images, labels in batches), self.accelerator.autocast)
        for problem in unreadable:
            _logger.warning('Skipped %s', problem)
        return Evaluation(gather_object(results), self.data.class_names)

    def describe_gates(self) -> str | None:
        """Describes the channel weights over some validation images. None for a model without ECA."""
        if not has_eca(self.network):
            return None
        images = self.data.val.part(range(0, len(self.data.val), -(-len(self.data.val) // _GATE_IMAGES)))
        batches = read_batches(self.network, images, 2 * self.batch_size, [], self.workers, self.data_config)
        collected, read = collect_gates(self.network, batches)
        return f'Channel weights over {len(read):,} validation images: {describe_gates(collected)}'


def _check_policy(policy: str, config: dict[str, Any]) -> None:
    """Raises a FinetuneError if timm does not know an AutoAugment policy, or Pillow refuses its operations."""
    try:
        transform = create_transform(**config, is_training=True, auto_augment=policy)
        for _ in range(200):  # each image gets some of the operations
            transform(Image.new(image_mode(config['input_size'][0]), (32, 32)))
    except (AssertionError, KeyError, ValueError) as e:
        raise FinetuneError(
            f'--aa {policy} is not possible with this timm and Pillow ({first_line(e)})',
            'give another policy, such as rand-m9-mstd0.5') from e


def _format(row: Mapping[str, float]) -> str:
    top5 = f'  {row["top5"]:6.2f}' if 'top5' in row else ''
    return (
        f'{row["epoch"]:5d}  {row["lr"]:13.2e}  {row["train_loss"]:10.4f}  {row["loss"]:8.4f}  {row["top1"]:6.2f}{top5}'
        f'  {row["seconds"]:7.1f}')


def _data_config(settings: Settings, model: nn.Module) -> dict[str, Any]:
    cfg: Any = model.pretrained_cfg
    size = (settings.img_size,) * 2 if settings.img_size else tuple(cfg['input_size'][1:])
    if cfg.get('fixed_input_size') and size != tuple(cfg['input_size'][1:]):
        raise FinetuneError(
            f'{settings.model} takes images of {cfg["input_size"][1]} pixels only', 'leave out --img-size')
    return resolve_data_config({
        'input_size': (settings.in_chans, *size), 'crop_pct': settings.crop_pct,
        'interpolation': settings.interpolation, 'mean': by_channel(settings.mean, cfg['mean'], settings.in_chans),
        'std': by_channel(settings.std, cfg['std'], settings.in_chans, positive=True),
    }, model=model)


def _freeze(model: nn.Module, names: str | None) -> list[nn.Module]:
    """Freezes parts of a model, and returns all frozen modules. Their norms must keep their statistics, too."""
    if names is None:
        return []
    network: Any = model
    if names == 'backbone':
        heads = network.get_classifier()
        network.requires_grad_(False)
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.requires_grad_(True)
    else:
        try:
            for name in names.split(','):
                model.get_submodule(name.strip()).requires_grad_(False)
        except AttributeError as e:
            children = ', '.join(name for name, _ in model.named_children())
            raise FinetuneError(
                f'--freeze {names}: there is no such module', f'choose among {children} and modules in them') from e
    parameters = {module: list(module.parameters()) for module in model.modules()}
    frozen = [module for module, own in parameters.items() if own and not any(p.requires_grad for p in own)]
    if model in frozen:
        raise FinetuneError(f'--freeze {names} leaves nothing to train', 'freeze less')
    return frozen
