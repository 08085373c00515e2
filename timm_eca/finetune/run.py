"""Fine-tunes a model on images, and writes a folder for timm and the Hub (extra `finetune`).

The loop is accelerate's, its parts are timm's. For what it lacks, there is timm's `train.py` with `timm-eca run`.
"""
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file
from timm import __version__ as timm_version
from timm.models import create_model, list_models, save_for_hf

from timm_eca.analysis.confusion import draw_confusion
from timm_eca.analysis.evaluate import Evaluation
from timm_eca.analysis.tables import write_csv
from timm_eca.errors import first_line
from timm_eca.finetune.card import render_finetuned_card
from timm_eca.finetune.data import DataError, TrainingData, open_sources, read_all, split_sources
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.report import draw_curves
from timm_eca.finetune.settings import FinetuneError, Settings, flag
from timm_eca.finetune.trainer import BEST_FILE, History, Trainer, last_checkpoint, on_main
from timm_eca.version import __version__
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.digests import digest, make_metadata, save_weights
from timm_eca.weights.key_maps import kernel_sizes_of
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL_MODULES

__all__ = ['Outcome', 'finetune']

SETTINGS_FILE = 'settings.json'
# What a fine-tuned model does not have from the weights it started from.
_DESCRIPTION = dict.fromkeys((
    'tag', 'license', 'origin_url', 'description', 'notes', 'hf_hub_id', 'label_names', 'label_descriptions'))


class Outcome(NamedTuple):
    """What `finetune` did."""
    folder: Path
    best: dict[str, float]  # the row of metrics.csv whose weights are in the folder


def finetune(settings: Settings, report: Callable[[str], None] = print) -> Outcome:
    """Fine-tunes a model.

    The folder `settings.output` gets `model.safetensors`, `config.json` and `README.md` of the epoch with the highest
    validation accuracy, and `metrics.csv`, `curves.png` and `confusion_matrix.png`. The state of the training is in
    its `checkpoints`, written after each epoch. `config.json` comes last: a folder that has it is whole. Under
    `accelerate launch` and `torchrun` it uses all their processes.

    Args:
        settings: What to do.
        report: Gets the lines that tell how it goes, on the first process.

    Raises:
        DataError: The images can't be trained on.
        FinetuneError: The settings are not possible, the folder can't be written, or the training fails.
        WeightsNotFoundError: There are no pretrained weights.
    """
    settings.check()
    accelerator = _make_accelerator(settings)
    if not accelerator.is_main_process:
        report = lambda line: None  # noqa: E731
    data = _read_data(accelerator, settings, report)
    output = _output_folder(settings, data)
    set_seed(settings.seed)
    model, start = create_with_weights(settings, data.class_names)
    state = output / 'checkpoints'
    # What has to be the same when a run goes on, as JSON has it.
    written = json.loads(json.dumps({**settings.written(), 'data': f'{data.name} ({data.fingerprint})'}))
    last = on_main(accelerator, lambda: _look_at_output(settings, written, output))
    if last is not None and (output / CONFIG_FILE).is_file():
        history = History.read(last)
        if len(history.rows) >= settings.epochs or history.stopped(settings.patience):
            report(f'{output} is finished, {len(history.rows)} epochs.')
            return Outcome(output, history.best)
    trainer = Trainer(accelerator, settings, model, data, report)
    on_main(accelerator, lambda: _claim_output(settings, written, output))
    trainer.describe(start)
    accelerator.project_configuration.logging_dir = str(state / 'log')
    accelerator.init_trackers(output.name, {name: str(value) for name, value in written.items()})
    try:
        if last is not None:
            trainer.resume(last)
        trainer.run(state)
        trainer.network.load_state_dict(load_file(state / f'epoch-{len(trainer.history.rows)}' / BEST_FILE))
        evaluation, gates = trainer.evaluate(trainer.network), trainer.describe_gates(trainer.network)
        on_main(accelerator, lambda: _finish(output, trainer, evaluation, start, gates))
    except KeyboardInterrupt:
        done = last_checkpoint(state)
        after = 'before the end of the first epoch' if done is None else f'after epoch {done.name.partition("-")[2]}'
        command = 'The same command without --force' if settings.force else 'The same command'
        report(f'Stopped {after}. {command} {"continues from there" if done else "starts again"}.')
        raise
    if gates:
        report(f'Channel weights over the validation images: {gates}')
    skipped = sum(int(part.skipped.sum()) for part in (data.train, trainer.val_loader.dataset))
    if skipped:
        report(f'Warning: {skipped} images could not be read, the next ones were taken instead.')
    accelerator.end_training()
    return Outcome(output, trainer.history.best)


def _make_accelerator(settings: Settings) -> Accelerator:
    cpu = settings.device == 'cpu' or not torch.accelerator.is_available()
    if settings.amp and settings.amp_dtype == 'float16' and cpu:
        raise FinetuneError('--amp-dtype float16 works on GPUs only: choose --amp-dtype bfloat16.')
    if settings.sync_bn and cpu:
        raise FinetuneError('SyncBatchNorm works on GPUs only: leave out --sync-bn.')
    if settings.log_with and settings.log_with not in map(str, get_available_trackers()):
        raise FinetuneError(f'--log-with {settings.log_with} needs a package: pip install {settings.log_with}.')
    accelerator = Accelerator(
        cpu=cpu,  # several processes on CPUs have to be asked for
        mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[settings.amp_dtype] if settings.amp else None,
        gradient_accumulation_steps=settings.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed, dispatch_batches=False),
        log_with=settings.log_with, project_config=ProjectConfiguration(logging_dir='.'),
    )
    if settings.device not in (None, accelerator.device.type):
        raise FinetuneError(
            f'--device {settings.device} can\'t be used: choose {accelerator.device.type}, and which of several by '
            'CUDA_VISIBLE_DEVICES.')
    return accelerator


def _read_data(accelerator: Accelerator, settings: Settings, report: Callable[[str], None]) -> TrainingData:
    try:
        sources = open_sources(
            settings.data, settings.data_dir, settings.train_split, settings.val_split, settings.in_chans,
            settings.dataset_download)
    except ImportError as e:
        raise DataError(f'{settings.data} needs a package that is not installed ({first_line(e)}).') from None
    datasets = [dataset for dataset in (sources.train, sources.val) if dataset is not None]

    def read() -> list[Any]:
        if not settings.check_images:
            return [None] * len(datasets)
        bar = partial(tqdm, desc='checking images', leave=False, disable=None)
        return [read_all(dataset, settings.workers, bar) for dataset in datasets]

    data = split_sources(sources, on_main(accelerator, read), settings.val_fraction, settings.seed)
    for note in data.notes:
        report(f'Warning: {note}')
    return data


def _output_folder(settings: Settings, data: TrainingData) -> Path:
    model = settings.model.rstrip('/').rpartition('/')[2].rpartition(':')[2]
    output = Path(os.path.abspath(settings.output or f'{model}-{data.name.replace("/", "-")}'))
    if output.is_relative_to(os.path.abspath(settings.data)):
        raise FinetuneError(f'The output {output} would be among the images: name another --output.')
    return output


def _look_at_output(settings: Settings, written: dict[str, Any], output: Path) -> Path | None:
    """The checkpoint to go on from, where there is one; refuses a folder that is somebody else's."""
    state = output / 'checkpoints'
    if not output.is_dir() or all(path == state and not any(state.glob('[!.]*')) for path in output.iterdir()):
        return None  # or an attempt left it so, which ended before it wrote anything
    try:
        earlier = json.loads((state / SETTINGS_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise FinetuneError(
            f'{output} exists and holds no run that can be continued: name another --output.') from None
    if settings.force:
        return None
    if (output / CONFIG_FILE).is_file() and not settings.resume:
        raise FinetuneError(
            f'{output} holds a finished run: name another --output, replace it with --force, or go on with --resume '
            'and more --epochs.')
    done = last_checkpoint(state)
    different = [name for name in written if earlier.get(name) != written[name]]
    if done and different:
        named = ', '.join(f'{flag(name)} {earlier.get(name)}' for name in different)
        raise FinetuneError(
            f'{output} holds a run with other settings ({named}): give these, name another --output, or replace it '
            'with --force.')
    return done


def _claim_output(settings: Settings, written: dict[str, Any], output: Path) -> None:
    """Makes the folder, and removes what is not to stay in it."""
    state = output / 'checkpoints'
    if settings.force:
        shutil.rmtree(state, ignore_errors=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *REPORT_FILES):
            (output / name).unlink(missing_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    for leftover in state.glob('.*'):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    text = json.dumps(written, indent=2) + '\n'
    atomic_write(state / SETTINGS_FILE, lambda path: path.write_text(text, encoding='utf-8'))


def _finish(output: Path, trainer: Trainer, evaluation: Evaluation, start: str, gates: str | None) -> None:
    """Writes the folder for timm and the Hub from the best weights, and loads it again."""
    data, history, names = trainer.data, trainer.history, trainer.data.class_names
    network = trainer.network.cpu().to(memory_format=torch.contiguous_format)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    table, curves, confusion = (output / name for name in REPORT_FILES)
    write_csv(table, [list(history.rows[0]), *([f'{value:.6g}' for value in row.values()] for row in history.rows)])
    draw_curves(curves, history.rows, history.best['epoch'])
    draw_confusion(confusion, evaluation.confusion_matrix(), names)

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
            evaluation=evaluation, train_count=len(data.train), gates=gates,
            command=_command(trainer.settings, data, history)),
        encoding='utf-8')
    for name in (CARD_FILE, WEIGHTS_FILE, CONFIG_FILE):  # the config last: with it the folder is whole
        os.replace(new / name, output / name)
    new.rmdir()


def _command(settings: Settings, data: TrainingData, history: History) -> str:
    """The command that repeats a run, without the paths of this machine, and the versions that it ran with."""
    words = ['timm-eca finetune', shlex.quote(data.name)]
    for option in fields(Settings)[1:]:
        value = getattr(settings, option.name)
        if value == option.default or (option.metadata.get('free') and option.name != 'epochs'):
            continue
        if option.name in ('initial_checkpoint', 'model') and (Path(value).exists() or value.startswith('local-dir:')):
            value = Path(value.removeprefix('local-dir:')).name
        if isinstance(value, bool):
            words.append(flag(option.name) if value else f'--no-{flag(option.name)[2:]}')
        else:
            values = value if isinstance(value, tuple) else [value]
            words.append(f'{flag(option.name)} {" ".join(shlex.quote(str(v)) for v in values)}')
    command = ' '.join(words) + f'  # timm_eca {__version__}, timm {timm_version}, torch {torch.__version__}'
    if len(set(history.planned)) > 1:
        command += (
            '\n# No single command repeats this run: it was continued with other --epochs, in turn '
            f'{", ".join(map(str, history.planned))}, and each has a schedule of its own.')
    return command
