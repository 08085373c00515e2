"""Trains a model by accelerate's loop and timm's parts, with a checkpoint after each epoch."""
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import Mixup, create_loader, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn

from timm_eca.analysis.evaluate import Evaluation, classify
from timm_eca.analysis.gates_report import describe_statistics, gate_statistics
from timm_eca.errors import TimmEcaError, first_line
from timm_eca.finetune.data import DataError, Examples, TrainingData
from timm_eca.finetune.settings import FinetuneError, Settings, flag
from timm_eca.models.param_groups import param_groups

__all__ = ['BEST_FILE', 'History', 'Trainer', 'last_checkpoint', 'on_main']

T = TypeVar('T')
BEST_FILE = 'best.safetensors'
HISTORY_FILE = 'history.json'


@dataclass
class History:
    """The rows of `metrics.csv`, how many steps were made, and the --epochs of each start."""
    rows: list[dict[str, float]] = field(default_factory=list)
    updates: int = 0
    planned: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, checkpoint: Path) -> 'History':
        """The history in a checkpoint."""
        try:
            return cls(**json.loads((checkpoint / HISTORY_FILE).read_text(encoding='utf-8')))
        except (OSError, ValueError, TypeError) as e:
            raise FinetuneError(
                f'{checkpoint / HISTORY_FILE} is damaged ({first_line(e)}): start again with --force.') from None

    def stopped(self, patience: int | None) -> bool:
        """Whether the accuracy has not become better in so many epochs."""
        best = max(range(len(self.rows)), key=lambda index: self.rows[index]['top1'])  # the first of several
        return patience is not None and len(self.rows) - 1 - best >= patience

    @property
    def best(self) -> dict[str, float]:
        """The row of the highest accuracy; of several, that of the lowest loss; of those, the first."""
        return min(self.rows, key=lambda row: (-row['top1'], row['loss'], row['epoch']))


def last_checkpoint(state: Path) -> Path | None:
    """The newest of the checkpoints in a folder."""
    return max(state.glob('epoch-*'), key=lambda path: int(path.name.partition('-')[2]), default=None)


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Runs a function on the first process, and returns what it returned, or raises, on all.

    An error that the first process did not expect is a FinetuneError on the others, which it ends in place of a wait.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, SafetensorError) as e:
            name, reason = getattr(e, 'filename', None) or 'The output', getattr(e, 'strerror', None) or first_line(e)
            error = FinetuneError(f'{name} can\'t be written ({reason}): make room, or name another --output.')
        except Exception as e:
            error = e
        if error is not None:
            outcome = [None, f'{"" if isinstance(error, TimmEcaError) else type(error).__name__ + ": "}{error}']
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise FinetuneError(outcome[1])
    return outcome[0]


class Trainer:
    """A model, and what it is trained with."""

    def __init__(
            self,
            accelerator: Accelerator,
            settings: Settings,
            model: nn.Module,
            data: TrainingData,
            report: Callable[[str], None],
    ) -> None:
        self.accelerator, self.settings, self.data, self.report = accelerator, settings, data, report
        self.history = History()
        self.frozen = _freeze(model, settings.freeze)
        if settings.sync_bn:
            model = convert_sync_batchnorm(model)
        # Faster on CPUs, and on GPUs in mixed precision.
        model.to(accelerator.device).to(memory_format=torch.channels_last)
        self.network = model
        self.data_config = _data_config(settings, model)
        self.train_loader, self.val_loader = self._make_loaders()
        self.updates_per_epoch = math.ceil(len(self.train_loader) / settings.grad_accum_steps)

        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, param_group_fn=partial(
                param_groups, lr=settings.lr, weight_decay=settings.weight_decay,
                attn_lr_scale=settings.attn_lr_scale, layer_decay=settings.layer_decay))
        warmup_epochs = settings.epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
        if warmup_epochs * self.updates_per_epoch < 2:  # a warm-up of one step would be that step lost
            warmup_epochs = 0
        try:
            self.scheduler, _ = create_scheduler_v2(
                optimizer, sched=settings.sched, num_epochs=settings.epochs, min_lr=settings.min_lr,
                warmup_lr=settings.lr / 100, warmup_epochs=warmup_epochs, step_on_epochs=False,
                updates_per_epoch=self.updates_per_epoch)
        except (TypeError, ValueError, AssertionError) as e:
            raise FinetuneError(
                f'--sched {settings.sched} can\'t be used ({first_line(e)}): choose cosine, step, poly, constant, ... '
                'or none.') from None
        self.ema = None
        if settings.model_ema:
            self.ema = ModelEmaV3(model, decay=settings.model_ema_decay, use_warmup=True)
            accelerator.register_for_checkpointing(self.ema)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=len(data.class_names))
        weights = _class_weights(settings.class_weights, data)
        self.loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=settings.smoothing).to(accelerator.device)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: with the averaged weights, where they are averaged."""
        return self.network if self.ema is None else self.ema.module

    def describe(self, start: str) -> None:
        """Reports what is trained, from where, and on what."""
        parameters, data = list(self.network.parameters()), self.data
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        self.report(f'{self.settings.model}: {total:,} parameters, {trained:,} of them trained, from {start}')
        self.report(
            f'{data.name}: {len(data.train):,} images to train on, {len(data.val):,} to validate on, '
            f'{len(data.class_names)} classes, {"x".join(map(str, self.data_config["input_size"][1:]))} pixels')

    def _make_loaders(self) -> tuple[Any, Any]:
        settings, config, accelerator = self.settings, self.data_config, self.accelerator
        common: dict[str, Any] = dict(
            config, use_prefetcher=False, num_workers=settings.workers, persistent_workers=False,
            pin_memory=accelerator.device.type == 'cuda')
        train, val = self.data.train, self.data.val
        batch_size = min(settings.batch_size, len(train) // accelerator.num_processes)
        if settings.mixup or settings.cutmix:
            batch_size -= batch_size % 2
        if batch_size < 1:
            raise DataError(
                f'{self.data.name} has too few images for {accelerator.num_processes} processes: add some.')
        # Each process validates on its part, none of it twice.
        own = val.indices[accelerator.process_index::accelerator.num_processes]
        val = Examples(val.dataset, own, val.mode)
        try:
            train_loader = create_loader(
                train, batch_size=batch_size, is_training=True, scale=settings.scale, hflip=settings.hflip,
                vflip=settings.vflip, color_jitter=settings.color_jitter, auto_augment=settings.aa,
                re_prob=settings.reprob, **common)
            val_loader = create_loader(val, batch_size=2 * batch_size, **common)
        except (AssertionError, KeyError, ValueError) as e:
            raise FinetuneError(
                f'timm can\'t make the transforms ({type(e).__name__}: {first_line(e)}): look at --aa {settings.aa} '
                f'and --interpolation {config["interpolation"]}.') from None
        return accelerator.prepare_data_loader(train_loader), val_loader

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint."""
        self.history = History.read(folder)
        try:
            self.accelerator.load_state(str(folder))
            if self.scheduler is not None:  # a function of the steps, and of how many epochs there are to be now
                self.scheduler.step_update(self.history.updates)
        except Exception as e:  # whatever a damaged file makes the reader stumble over
            raise FinetuneError(
                f'{folder} is damaged ({type(e).__name__}: {first_line(e)}): start again with --force.') from None
        self.report(f'Continuing after epoch {len(self.history.rows)}.')
        epochs, planned = self.settings.epochs, self.history.planned[-1:]
        if planned and planned != [epochs]:
            self.report(
                f'The learning rate now follows the schedule of {epochs} epochs in place of {planned[0]}: it goes on '
                f'at {self.optimizer.param_groups[-1]["lr"]:.2e}.')

    def run(self, state: Path) -> None:
        """Trains what is left of the epochs, writing a checkpoint after each."""
        settings, history = self.settings, self.history
        if history.planned[-1:] != [settings.epochs]:
            history.planned.append(settings.epochs)
        top5 = '   top-5' if len(self.data.class_names) > 5 else ''
        self.report(f'epoch  learning rate  train loss  val loss   top-1{top5}  seconds')
        for row in history.rows:
            self.report(_format(row))
        for epoch in range(len(history.rows) + 1, settings.epochs + 1):
            if history.rows and history.stopped(settings.patience):
                break
            # Each epoch has its own seed, so that one that is resumed sees the same images in the same order.
            set_seed((settings.seed * 100_003 + epoch) % 2 ** 32, device_specific=True)
            started = time.monotonic()
            try:
                training = self._train(epoch)
            except ValueError as e:
                if 'more than 1 value per channel' not in str(e):
                    raise
                raise FinetuneError(
                    'The norms have nothing to average over: give a higher --batch-size or --img-size.') from None
            metrics = self.evaluate(self.kept).metrics
            row = {'epoch': epoch, **training, **metrics, 'seconds': round(time.monotonic() - started, 1)}
            history.rows.append(row)
            self._save(state, epoch)
            self.report(_format(row))
            self.accelerator.log(row, step=epoch)
        if len(history.rows) < settings.epochs:
            self.report(f'Stopped early: no better accuracy in {settings.patience} epochs.')

    def _train(self, epoch: int) -> dict[str, float]:
        """Trains an epoch, and returns its mean learning rate, without the factor of the attention, and loss."""
        accelerator, settings = self.accelerator, self.settings
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.train_loader.set_epoch(epoch)
        steps, batches = settings.grad_accum_steps, len(self.train_loader)
        last = batches % steps or steps  # batches of the last step
        total, rates = torch.zeros(2, device=accelerator.device), []
        bar, told = self._bar(self.train_loader, f'epoch {epoch}/{settings.epochs}'), time.monotonic()
        for index, (images, targets) in enumerate(bar):
            images = images.contiguous(memory_format=torch.channels_last)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.loss(self.model(images), targets)
                # accelerate divides by the number of batches of a step; the last step may have fewer.
                accelerator.backward(loss * (steps / last) if index >= batches - last else loss)
                if accelerator.sync_gradients and settings.clip_grad is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(self.optimizer.param_groups[-1]['lr'])  # the classifier's
                self.history.updates += 1
                if self.scheduler is not None:
                    self.scheduler.step_update(self.history.updates)
                if self.ema is not None:
                    self.ema.update(self.network, self.history.updates)
            total += torch.stack([loss.detach() * len(images), loss.new_tensor(len(images))])
            if time.monotonic() - told >= (60 if bar.disable else 1):  # seldom, for it waits for the GPU
                told, running = time.monotonic(), f'loss {float(total[0] / total[1]):.4f}'
                bar.set_postfix_str(running, refresh=False)
                if bar.disable:
                    self.report(f'epoch {epoch}: {index + 1:,} of {batches:,} batches, {running}')
        if accelerator.num_processes > 1:  # the processes' running statistics differ
            for network in (self.network, *([self.ema.module] if self.ema is not None else [])):
                distribute_bn(network, accelerator.num_processes, reduce=True)
        total = accelerator.reduce(total)
        value = float(total[0] / total[1])
        if not math.isfinite(value):
            raise FinetuneError(f'The loss is not finite in epoch {epoch}: lower --lr, or leave out --amp.')
        return {'lr': sum(rates) / len(rates), 'train_loss': value}

    def _bar(self, batches: Any, text: str) -> tqdm:
        """A progress bar on the first process, where that has a terminal."""
        return tqdm(batches, text, leave=False, disable=None if self.accelerator.is_main_process else True)

    def evaluate(self, network: nn.Module) -> Evaluation:
        """Validates, each process on its part."""
        results = classify(network, self._bar(self.val_loader, 'validating'), self.accelerator.autocast)
        return Evaluation(gather_object(results), self.data.class_names)

    def describe_gates(self, network: nn.Module) -> str | None:
        """What the channel weights are over the validation images, in words; None of a model without ECA."""
        statistics: dict[str, torch.Tensor] = {}
        with suppress(ValueError):
            statistics = gate_statistics(network, self._bar(self.val_loader, 'channel weights'))
        return describe_statistics(gather_object([statistics]))

    def _save(self, state: Path, epoch: int) -> None:
        """Writes a checkpoint with the best weights so far, and removes the one before when it is whole."""
        accelerator = self.accelerator
        new, before = state / f'.epoch-{epoch}.new', state / f'epoch-{epoch - 1}'

        def complete() -> None:
            (new / HISTORY_FILE).write_text(json.dumps(asdict(self.history)), encoding='utf-8')
            if self.history.best['epoch'] == epoch:
                weights = {key: value.detach().cpu().contiguous() for key, value in self.kept.state_dict().items()}
                save_file(weights, new / BEST_FILE)
            else:
                shutil.copyfile(before / BEST_FILE, new / BEST_FILE)
            new.rename(state / f'epoch-{epoch}')
            shutil.rmtree(before, ignore_errors=True)

        try:
            on_main(accelerator, new.mkdir)
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            on_main(accelerator, complete)
        except BaseException as e:
            if accelerator.is_main_process:
                shutil.rmtree(new, ignore_errors=True)
            if isinstance(e, OSError | RuntimeError | SafetensorError):  # as torch and safetensors have it
                raise FinetuneError(f'{new} can\'t be written ({first_line(e)}): make room.') from None
            raise


def _format(row: Mapping[str, float]) -> str:
    top5 = f'  {row["top5"]:6.2f}' if 'top5' in row else ''
    return (
        f'{row["epoch"]:5d}  {row["lr"]:13.2e}  {row["train_loss"]:10.4f}  {row["loss"]:8.4f}  {row["top1"]:6.2f}{top5}'
        f'  {row["seconds"]:7.1f}')


def _data_config(settings: Settings, model: nn.Module) -> dict[str, Any]:
    args = {name: getattr(settings, name) for name in ('crop_pct', 'interpolation', 'mean', 'std')}
    cfg: Any = model.pretrained_cfg
    size = (settings.img_size,) * 2 if settings.img_size else tuple(cfg['input_size'][1:])
    if cfg.get('fixed_input_size') and size != tuple(cfg['input_size'][1:]):
        raise FinetuneError(
            f'{settings.model} takes images of {cfg["input_size"][1]} pixels only: leave out --img-size.')
    for name in ('mean', 'std'):
        if args[name] is None and len(cfg[name]) != settings.in_chans:
            args[name] = (round(sum(cfg[name]) / len(cfg[name]), 4),) * settings.in_chans
        elif args[name] is not None and len(args[name]) not in (1, settings.in_chans):
            raise FinetuneError(
                f'{flag(name)} needs as many numbers as there are channels, {settings.in_chans}, or one.')
    return resolve_data_config({**args, 'input_size': (settings.in_chans, *size)}, model=model)


def _freeze(model: nn.Module, names: str | None) -> list[nn.Module]:
    """Freezes parts of a model, and returns them: their norms' statistics are to stay as well."""
    if names is None:
        return []
    network: Any = model
    if names == 'backbone':
        heads = network.get_classifier()
        kept = {id(p) for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
        parameters = {module: {id(p) for p in module.parameters()} for module in model.modules()}
        frozen = [module for module, own in parameters.items() if own and not own & kept]
    else:
        try:
            frozen = [model.get_submodule(name.strip()) for name in names.split(',')]
        except AttributeError:
            children = ', '.join(name for name, _ in model.named_children())
            raise FinetuneError(
                f'--freeze {names}: there is no such module, choose among {children} and what is in them.') from None
    for module in frozen:
        module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise FinetuneError(f'--freeze {names} leaves nothing to train.')
    return frozen


def _class_weights(weights: str | None, data: TrainingData) -> torch.Tensor | None:
    if weights is None:
        return None
    count = len(data.class_names)
    if weights == 'balanced':
        counts = torch.bincount(torch.tensor(data.train_targets), minlength=count)
        return counts.sum() / (count * counts.float())
    try:
        numbers = torch.tensor([float(number) for number in weights.split(',')])
    except ValueError:
        numbers = torch.zeros(0)
    if len(numbers) != count or not (numbers > 0).all() or not numbers.isfinite().all():
        raise FinetuneError(f'--class-weights {weights}: give "balanced", or {count} positive numbers.')
    return numbers
