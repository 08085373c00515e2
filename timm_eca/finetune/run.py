"""Fine-tunes a model on images, and leaves a folder for timm and the Hub (extra `finetune`).

The loop is accelerate's, all that it is made of timm's. Who needs more runs timm's `train.py` by `timm-eca run`.
"""
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file
from timm import __version__ as timm_version
from timm.models import create_model, list_models, save_for_hf
from torch.utils.data import IterableDataset

from timm_eca.analysis.confusion import draw_confusion
from timm_eca.errors import first_line
from timm_eca.finetune.card import render_finetuned_card
from timm_eca.finetune.data import DataError, TrainingData, open_sources, read_all, split_sources
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.report import draw_curves, write_metrics
from timm_eca.finetune.settings import FinetuneError, Settings, flag
from timm_eca.finetune.trainer import BEST_FILE, Evaluation, History, Trainer, on_main
from timm_eca.version import __version__
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.digests import digest, make_metadata, save_weights
from timm_eca.weights.key_maps import kernel_sizes_of
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL_MODULES

__all__ = ['Outcome', 'finetune']

SETTINGS_FILE = 'settings.json'
# Where the data doesn't say what suits it.
_DEFAULTS: dict[str, Any] = {'epochs': 5, 'scale': (0.35, 1.0), 'hflip': 0.5, 'color_jitter': 0.4}
# What a fine-tuned model does not have from the weights it started from.
_DESCRIPTION = dict.fromkeys((
    'tag', 'license', 'origin_url', 'description', 'notes', 'hf_hub_id', 'label_names', 'label_descriptions'))
# Settings of a run that may be others when it is resumed.
_FREE = {'data_dir', 'output', 'epochs', 'workers', 'check_images', 'resume', 'force', 'dataset_download'}


class Outcome(NamedTuple):
    """What `finetune` did."""
    folder: Path
    epochs: int  # that were trained, in all
    best: dict[str, float]  # the row of metrics.csv whose weights are in the folder


def finetune(settings: Settings, report: Callable[[str], None] = print) -> Outcome:
    """Fine-tunes a model.

    The folder `settings.output` gets `model.safetensors`, `config.json` and `README.md` of the epoch with the highest
    validation accuracy, and `metrics.csv`, `curves.png` and `confusion_matrix.png`. The state of the training is below
    its `checkpoints`, written after each epoch. `config.json` comes last: a folder that has it is whole. Below
    `accelerate launch` and `torchrun` it uses all their processes.

    Args:
        settings: What to do.
        report: Gets the lines that tell how it goes, on the first process.

    Raises:
        DataError: The images can't be trained on.
        FinetuneError: The settings don't make sense, the folder can't be written, or the training fails.
        WeightsNotFoundError: The pretrained weights can't be had.
    """
    settings.check()
    cpu = settings.cpu or not torch.accelerator.is_available()
    if settings.amp == 'fp16' and cpu:
        raise FinetuneError('--amp fp16 works on GPUs only: choose bf16.')
    accelerator = Accelerator(
        cpu=cpu,  # several processes on CPUs have to be asked for
        mixed_precision=settings.amp,
        gradient_accumulation_steps=settings.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed, dispatch_batches=False),
    )
    if not accelerator.is_main_process:
        report = _silent
    if settings.sync_bn and accelerator.device.type == 'cpu':
        raise FinetuneError('SyncBatchNorm works on GPUs only: leave out --sync-bn.')
    if settings.workers is None:
        cores = (os.cpu_count() or 1) // 4 if accelerator.device.type == 'cpu' else 4
        settings = replace(settings, workers=min(cores, 4))
    data = _read_data(accelerator, settings, report)
    settings, output = _settle(settings, data)
    set_seed(settings.seed)
    model, start = create_with_weights(settings, data.class_names)
    state = output / 'checkpoints'
    last = on_main(accelerator, lambda: _look_at_output(settings, data, output))
    if last is not None and (output / CONFIG_FILE).is_file():
        history = History.read(state / last)
        if len(history.rows) >= settings.epochs or history.stopped(settings.patience):
            report(f'{output} is finished, {len(history.rows)} epochs.')
            return Outcome(output, len(history.rows), history.best)
    trainer = Trainer(accelerator, settings, model, data, report)
    on_main(accelerator, lambda: _claim_output(settings, data, output))
    _describe(report, settings, data, trainer, start)
    if last is not None:
        trainer.resume(state / last)
        report(f'Continuing after epoch {len(trainer.history.rows)}.')
    trainer.run(state)
    best = state / f'epoch-{len(trainer.history.rows)}' / BEST_FILE
    trainer.network.load_state_dict(load_file(best))
    evaluation = trainer.evaluate(trainer.network)
    on_main(accelerator, lambda: _finish(output, settings, data, trainer, evaluation, start))
    skipped = sum(int(part.skipped.sum()) for part in (data.train, trainer.val_loader.dataset))
    if skipped:
        report(f'Warning: {skipped} images could not be read, the next ones were taken instead.')
    accelerator.end_training()
    return Outcome(output, len(trainer.history.rows), trainer.history.best)


def _silent(line: str) -> None:
    pass


def _read_data(accelerator: Accelerator, settings: Settings, report: Callable[[str], None]) -> TrainingData:
    try:
        sources = open_sources(
            settings.data, settings.data_dir, settings.train_split, settings.val_split, settings.in_chans,
            settings.dataset_download)
    except ImportError as e:
        raise DataError(f'{settings.data} needs a package that is not installed ({first_line(e)}).') from None
    datasets = [dataset for dataset in (sources.train, sources.val) if dataset is not None]

    def read() -> list[Any]:
        if not settings.check_images or any(isinstance(dataset, IterableDataset) for dataset in datasets):
            return [None] * len(datasets)
        bar = partial(tqdm, desc='checking images', leave=False, disable=None)
        return [read_all(dataset, settings.workers, bar) for dataset in datasets]

    data = split_sources(
        sources, on_main(accelerator, read), settings.val_fraction, settings.seed, settings.in_chans)
    for note in data.notes:
        report(f'Warning: {note}')
    return data


def _settle(settings: Settings, data: TrainingData) -> tuple[Settings, Path]:
    """The settings with what suits the data where the user left it open, and the output folder."""
    values = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    values['lr'] = (1e-3 if settings.pretrained else 2e-3) if settings.lr is None else settings.lr
    values |= {name: value for name, value in (_DEFAULTS | data.settings).items() if values[name] is None}
    name = f'{settings.model.rsplit("/", 1)[-1].rsplit(":", 1)[-1]}-{data.name.replace("/", "-")}'
    values['output'] = settings.output or name
    if Path(os.path.abspath(values['output'])).is_relative_to(os.path.abspath(settings.data)):
        raise FinetuneError(f'The output {values["output"]} would lie among the images: name another --output.')
    return Settings(**values), Path(os.path.abspath(values['output']))


def _written_settings(settings: Settings, data: TrainingData) -> dict[str, Any]:
    """What has to be the same when a run goes on, as JSON has it."""
    values = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.name not in _FREE}
    return json.loads(json.dumps({**values, 'data': f'{data.name} ({data.fingerprint})'}))


def _look_at_output(settings: Settings, data: TrainingData, output: Path) -> str | None:
    """The name of the checkpoint to go on from, where there is one; refuses a folder that is somebody else's."""
    state = output / 'checkpoints'
    if os.path.lexists(output) and not output.is_dir():
        raise FinetuneError(f'{output} is a file: name another --output.')
    if not output.is_dir() or all(path == state and not any(state.glob('[!.]*')) for path in output.iterdir()):
        return None  # or it is as an attempt left it that didn't come to write anything
    try:
        earlier = json.loads((state / SETTINGS_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise FinetuneError(
            f'{output} exists and holds no run that could be continued: name another --output.') from None
    if settings.force:
        return None
    if (output / CONFIG_FILE).is_file() and not settings.resume:
        raise FinetuneError(f'{output} holds a finished run: name another --output, or replace it with --force.')
    done = sorted(state.glob('epoch-*'), key=lambda path: int(path.name.partition('-')[2]))
    current = _written_settings(settings, data)
    different = [name for name in current if earlier.get(name) != current[name]]
    if done and different:
        named = ', '.join(f'{flag(name)} {earlier.get(name)}' for name in different)
        raise FinetuneError(
            f'{output} holds a run with other settings ({named}): give the same, name another --output, or replace it '
            'with --force.')
    return done[-1].name if done else None


def _claim_output(settings: Settings, data: TrainingData, output: Path) -> None:
    """Makes the folder, and removes what is not to stay in it."""
    state = output / 'checkpoints'
    if settings.force:
        shutil.rmtree(state, ignore_errors=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *REPORT_FILES):
            (output / name).unlink(missing_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    for leftover in state.glob('.*'):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    text = json.dumps(_written_settings(settings, data), indent=2) + '\n'
    atomic_write(state / SETTINGS_FILE, lambda path: path.write_text(text, encoding='utf-8'))


def _describe(
        report: Callable[[str], None],
        settings: Settings,
        data: TrainingData,
        trainer: Trainer,
        start: str,
) -> None:
    parameters = list(trainer.network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    report(f'{settings.model}: {total:,} parameters, {trained:,} of them trained, from {start}')
    if data.train_targets is not None and data.val_targets is not None:
        report(
            f'{data.name}: {len(data.train_targets):,} images to train on, {len(data.val_targets):,} to validate on, '
            f'{len(data.class_names)} classes, {"x".join(map(str, trainer.data_config["input_size"][1:]))} pixels')


def _finish(
        output: Path,
        settings: Settings,
        data: TrainingData,
        trainer: Trainer,
        evaluation: Evaluation,
        start: str,
) -> None:
    """Writes the folder for timm and the Hub from the best weights, and loads it again."""
    history, names = trainer.history, data.class_names
    network = trainer.network.cpu().to(memory_format=torch.contiguous_format)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    table, curves, confusion = (output / name for name in REPORT_FILES)
    atomic_write(table, lambda path: write_metrics(path, history.rows))
    atomic_write(curves, lambda path: draw_curves(path, history.rows, history.best['epoch']))
    atomic_write(
        confusion,
        lambda path: draw_confusion(path, evaluation.targets, evaluation.predictions, names))

    new, state_dict = output / 'checkpoints' / '.folder.new', network.state_dict()
    save_for_hf(
        network, str(new), safe_serialization=True, data_config=trainer.data_config,
        model_config={'label_names': list(names), 'pretrained_cfg': _DESCRIPTION})
    config = json.loads((new / CONFIG_FILE).read_text(encoding='utf-8'))
    arguments = config.setdefault('model_args', {})
    arguments.pop('num_classes', None)  # transformers gives it, too
    if config['architecture'] in list_models(module=list(OFFICIAL_MODULES)):
        arguments['kernel_sizes'] = kernel_sizes_of(state_dict)
    (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    digests = {key: digest(value) for key, value in state_dict.items()}
    save_weights(state_dict, new / WEIGHTS_FILE, make_metadata(digests, source=f'finetune, {data.name}'))
    loaded = create_model(f'local-dir:{new}', pretrained=True).state_dict()
    changed = [key for key, value in state_dict.items() if not torch.equal(loaded[key], value)]
    if changed:
        raise FinetuneError(f'{output}: {changed[0]} came back with other bits than it was written with: try again.')
    (new / CARD_FILE).write_text(
        render_finetuned_card(
            network, config, start=start, data_name=data.name, history=history.rows, best=history.best,
            targets=evaluation.targets, predictions=evaluation.predictions,
            train_count=len(data.train_targets) if data.train_targets is not None else None,
            command=_command(settings, data)),
        encoding='utf-8')
    for name in (CARD_FILE, WEIGHTS_FILE, CONFIG_FILE):  # the config last: with it the folder is whole
        os.replace(new / name, output / name)
    new.rmdir()


def _command(settings: Settings, data: TrainingData) -> str:
    """The command that repeats a run, without the paths of this machine, and the versions that it ran with."""
    words = ['timm-eca finetune', data.name]
    for option in fields(Settings):
        value = getattr(settings, option.name)
        if value == option.default or option.name in _FREE - {'epochs'} | {'data'}:
            continue
        if option.name == 'checkpoint':
            value = Path(value).name
        if option.name == 'model' and value.startswith('local-dir:'):
            value = f'local-dir:{Path(value.partition(":")[2]).name}'
        if isinstance(value, bool):
            words.append(flag(option.name) if value else f'--no-{flag(option.name)[2:]}')
        else:
            words.append(f'{flag(option.name)} {" ".join(map(str, value)) if isinstance(value, tuple) else value}')
    return ' '.join(words) + f'  # timm_eca {__version__}, timm {timm_version}, torch {torch.__version__}'
