"""Fine-tunes a model on images, and writes a folder for timm and the Hub (extra `finetune`).

For recipes that it lacks, use timm's `train.py` with `timm-eca run`.
"""
import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from timm import __version__ as timm_version

from timm_eca.analysis.evaluate import CONFUSIONS_FILE, MATRIX_FILE, MAX_DRAWN, Evaluation, write_confusions
from timm_eca.analysis.figures import draw_confusion, draw_curves
from timm_eca.analysis.gates import has_eca
from timm_eca.analysis.tables import write_csv
from timm_eca.errors import first_line, printable
from timm_eca.finetune.examples import split_sources
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.settings import FinetuneError, Settings, as_option
from timm_eca.finetune.state import STATE_ERRORS, STATE_FILE
from timm_eca.finetune.trainer import Trainer, on_main
from timm_eca.images.batches import Checked, read_all
from timm_eca.images.reader import ImageError
from timm_eca.images.sources import Sources, open_sources
from timm_eca.version import __version__
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.card import finetuned_card
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE, write_model

__all__ = ['finetune']

LOCK_FILE = 'checkpoints/.timm_eca-lock'
LOG_FOLDER = 'checkpoints/log'  # of a tracker
TABLE_FILE, CURVES_FILE = 'metrics.csv', 'curves.png'
# What a fine-tuned model doesn't inherit from the weights that it started from.
_DESCRIPTION = dict.fromkeys((
    'tag', 'license', 'origin_url', 'description', 'notes', 'hf_hub_id', 'label_names', 'label_descriptions'))


def finetune(settings: Settings) -> Path:
    """Fine-tunes a model.

    The folder `settings.output` gets `model.safetensors`, `config.json` and `README.md` of the epoch with the highest
    validation accuracy. Then it gets `metrics.csv`, `confusion_matrix.png` (`confusions.csv` for more than 100 classes)
    and `curves.png`. The state of the training is in its `checkpoints/timm_eca.pt`, written after each epoch. Under
    `accelerate launch` and `torchrun` all their processes train.

    Returns:
        The folder.

    Raises:
        TimmEcaError: The settings, the images or the model are not possible, there are no pretrained weights, the
            folder can't be written, or the loss is not finite.
    """
    settings.check()
    accelerator = _make_accelerator(settings)
    workers = settings.workers
    if workers is None:
        workers = 4 if accelerator.device.type != 'cpu' else min(4, (os.cpu_count() or 1) // 4)
    sources = open_sources(
        settings.data, settings.dataset_cache, settings.train_split, settings.val_split, settings.in_chans)
    data = _check_images(accelerator, settings, sources, workers)
    for note in data.notes:
        accelerator.print(f'Warning: {note}')
    model_name = settings.model.rstrip('/').rpartition('/')[2].rpartition(':')[2]
    output = Path(os.path.abspath(settings.output or f'{model_name}-{data.name.replace("/", "-")}'))
    if output.is_relative_to(os.path.abspath(settings.data)):
        raise FinetuneError(f'The output {output} would be among the images', 'name another --output')
    set_seed(settings.seed)
    model, start = create_with_weights(settings, data.class_names)
    # What has to be the same when a run continues.
    written = {f.name: getattr(settings, f.name) for f in fields(settings) if not f.metadata.get('free')}
    written |= {'data': f'{data.name} ({sources.fingerprint})', 'amp_dtype': accelerator.mixed_precision}
    earlier = _read_state(settings, written, output)
    if earlier is not None and _is_finished(output) and len(earlier['rows']) >= settings.epochs:
        accelerator.print(f'{_shorten(output)} is finished, after {len(earlier["rows"])} epochs.')
        return output
    trainer = Trainer(accelerator, settings, model, data, workers)
    with ExitStack() as stack:
        on_main(accelerator, lambda: _claim_output(settings, output, stack))
        trainer.describe(start)
        accelerator.project_configuration.logging_dir = str(output / LOG_FOLDER)
        accelerator.init_trackers(output.name, {name: str(value) for name, value in written.items()})
        about = {'settings': written, 'command': _command(settings, output)}
        try:
            if earlier is not None:
                with _reading(output / STATE_FILE):
                    trainer.resume(earlier)
            trainer.run(lambda state: _save_state(output / STATE_FILE, about | state))
        except KeyboardInterrupt:
            command = f'The same command{" without --force" * settings.force}'
            accelerator.print(f'Stopped after epoch {trainer.saved}. {command} continues the run.')
            raise
        trainer.network.load_state_dict(trainer.best_weights)
        if settings.recompute_statistics:
            trainer.recompute_statistics()
        evaluation = trainer.evaluate(trainer.network)
        on_main(accelerator, lambda: _finish(output, trainer, evaluation, start))
    accelerator.end_training()
    accelerator.print(f'{_shorten(output)}: {evaluation.accuracy}, of epoch {trainer.best["epoch"]}')
    accelerator.print('\n'.join(['Next:', *_next_commands(settings, output, data, has_eca(trainer.network))]))
    return output


def _make_accelerator(settings: Settings) -> Accelerator:
    cpu = settings.device == 'cpu' or not torch.accelerator.is_available()
    amp_dtype = settings.amp_dtype or ('bfloat16' if cpu else 'float16')
    if settings.amp and cpu and amp_dtype == 'float16':
        raise FinetuneError('--amp-dtype float16 works on GPUs only', 'choose --amp-dtype bfloat16')
    if settings.sync_bn and cpu:
        raise FinetuneError('SyncBatchNorm works on GPUs only', 'leave out --sync-bn')
    if settings.log_with and settings.log_with not in map(str, get_available_trackers()):
        raise FinetuneError(f'--log-with {settings.log_with} needs a package', f'pip install {settings.log_with}')
    accelerator = Accelerator(
        cpu=cpu,  # without it, accelerate refuses several processes on CPUs
        mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[amp_dtype] if settings.amp else None,
        gradient_accumulation_steps=settings.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed, dispatch_batches=False),
        log_with=settings.log_with, project_config=ProjectConfiguration(logging_dir='.'),
        # The other processes wait while the first reads all images. Their default is ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if settings.device not in (None, accelerator.device.type):
        raise FinetuneError(
            f'--device {settings.device} can\'t be used',
            f'choose {accelerator.device.type}, and one of several GPUs by CUDA_VISIBLE_DEVICES')
    return accelerator


def _check_images(accelerator: Accelerator, settings: Settings, sources: Sources, workers: int) -> Sources:
    """The images that can be read, to train and to validate on."""
    datasets = [dataset for dataset in (sources.train, sources.val) if dataset is not None]
    checked = [Checked({}, {}) for _ in datasets]
    if settings.check_images:
        checked = on_main(accelerator, lambda: [read_all(dataset, workers) for dataset in datasets])
    data = split_sources(sources, checked, settings.val_fraction, settings.seed)
    for part in (data.train, data.val):
        if all(part[i].problem for i in range(len(part))):  # it stops at the first that can be read
            raise ImageError(f'None of {len(part)} images can be read', 'leave out --no-check-images to see why')
    return data


def _is_finished(output: Path) -> bool:
    return (output / CONFIG_FILE).is_file() and (output / CURVES_FILE).is_file()  # `_finish` writes the curves last


def _read_state(settings: Settings, written: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """The state to continue from, if there is one. Refuses a folder with other things."""
    path = output / STATE_FILE
    if not path.exists():
        if {*output.glob('[!.]*'), *path.parent.glob('[!.]*')} - {path.parent, output / LOG_FOLDER}:
            raise FinetuneError(f'{output} exists and holds no run that can continue', 'name another --output')
        return None
    if settings.force:
        return None
    if _is_finished(output) and not settings.extend:
        raise FinetuneError(
            f'{output} holds a finished run',
            'name another --output, replace it with --force, or continue with --extend and more --epochs')
    with _reading(path):
        state = torch.load(path, map_location='cpu', weights_only=True)
        same, command, _ = state['settings'] == written, state['command'], len(state['rows'])
    if not same:
        raise FinetuneError(
            f'{output} holds a run with other settings or images ({printable(str(command), 1000)})',
            'give these, name another --output, or replace it with --force')
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors that a damaged state file causes into a FinetuneError."""
    try:
        yield
    except STATE_ERRORS as e:
        raise FinetuneError(
            f'{path} is damaged ({type(e).__name__}: {first_line(e)})', 'start again with --force') from e


def _claim_output(settings: Settings, output: Path, stack: ExitStack) -> None:
    """Makes the folder, locks it until the stack is closed, and removes files of an earlier run."""
    state = output / STATE_FILE
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(WeakFileLock(output / LOCK_FILE, timeout=1))
    except Timeout as e:
        raise FinetuneError(f'Another run is writing to {output}', 'wait for it, or name another --output') from e
    if settings.force:
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *REPORT_FILES):
            (output / name).unlink(missing_ok=True)
        state.unlink(missing_ok=True)  # last: it shows that the folder is ours


def _save_state(path: Path, state: dict[str, Any]) -> None:
    try:
        atomic_write(path, lambda new: torch.save(state, new))
    except RuntimeError as e:  # torch raises it on a full disk
        raise OSError(errno.ENOSPC, first_line(e), str(path)) from e


def _finish(output: Path, trainer: Trainer, evaluation: Evaluation, start: str) -> None:
    """Writes the folder for timm and the Hub from the best weights, and then the reports."""
    rows, names, gates = trainer.rows, trainer.data.class_names, trainer.describe_gates()
    if gates:
        trainer.accelerator.print(gates)
    with TemporaryDirectory(prefix='.timm_eca-', dir=output) as new:
        _write_model(Path(new), output, trainer, evaluation, start, gates)
        for name in (CONFIG_FILE, CURVES_FILE):
            (output / name).unlink(missing_ok=True)
        for name in (CARD_FILE, WEIGHTS_FILE, CONFIG_FILE):  # the config last: a folder with it can be loaded
            os.replace(Path(new, name), output / name)
    write_csv(output / TABLE_FILE, [list(rows[0]), *([f'{value:.6g}' for value in row.values()] for row in rows)])
    if len(names) <= MAX_DRAWN:
        draw_confusion(output / MATRIX_FILE, evaluation.confusion_matrix(), names)
    else:
        write_confusions(output / CONFUSIONS_FILE, evaluation)
    draw_curves(output / CURVES_FILE, rows, trainer.best['epoch'])


def _write_model(
        folder: Path, output: Path, trainer: Trainer, evaluation: Evaluation, start: str, gates: str | None) -> None:
    """Writes the weights, the config and the card."""
    data, names = trainer.data, trainer.data.class_names
    network: Any = trainer.network.cpu().to(memory_format=torch.contiguous_format)
    config = write_model(
        folder, network, {'source': f'finetune, {data.name}'}, data_config=trainer.data_config,
        model_config={'label_names': list(names), 'pretrained_cfg': _DESCRIPTION})
    versions = f'timm_eca {__version__}, timm {timm_version}, torch {torch.__version__}'
    command = f'{_command(trainer.settings, output, data.name)}  # {versions}'
    epochs = ', '.join(map(str, dict.fromkeys(trainer.planned)))
    if ',' in epochs:
        command += f'\n# No single command repeats this run: it went on with other --epochs, in turn {epochs}.'
    card = finetuned_card(
        network, config, start=start, data_name=data.name, epochs=len(trainer.rows),
        best_epoch=int(trainer.best['epoch']), metrics=evaluation.metrics, train_count=len(data.train),
        val_count=len(evaluation.results), class_scores=[(s.name, s.images, s.recall) for s in evaluation.by_class()],
        command=command, gates=gates,
        worst_pairs=None if len(names) <= MAX_DRAWN else evaluation.worst_pairs(),
        license=network.pretrained_cfg.get('license'), base_model=network.pretrained_cfg.get('hf_hub_id'))
    (folder / CARD_FILE).write_text(card, encoding='utf-8')


def _command(settings: Settings, output: Path, data_name: str | None = None) -> str:
    """The command of a run, with absolute paths. With `data_name` it has no paths of this machine."""
    def place(name: str) -> str:
        path = Path(name.removeprefix('local-dir:'))
        if not path.exists():
            return name
        return path.name if data_name else os.path.abspath(path)

    default = replace(Settings.suited(settings.data, model='', pretrained=settings.pretrained), pretrained=True)
    left_out = {'force', *(('dataset_cache', 'check_images', 'workers', 'device') if data_name else ())}
    values = {option.name: getattr(settings, option.name) for option in fields(Settings)[1:]} | {'output': str(output)}
    values |= {name: place(values[name]) for name in (
        'model', 'output', 'initial_checkpoint', 'dataset_cache') if values[name] is not None}
    given = [
        as_option(name, value) for name, value in values.items()
        if name not in left_out and value != getattr(default, name)]
    return ' '.join(['timm-eca finetune', shlex.quote(data_name or place(settings.data)), *given])


def _shorten(path: str | Path) -> str:
    """A path from the working directory if it is below it, else the absolute path."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _next_commands(settings: Settings, output: Path, data: Sources, eca: bool) -> list[str]:
    """Commands that use the folder."""
    is_folder = os.path.isdir(settings.data)
    folder = shlex.quote(_shorten(output))
    source = shlex.quote(_shorten(settings.data) if is_folder else settings.data)
    split = f' --split {shlex.quote(settings.val_split)}' if settings.val_split else ''
    commands = [f'evaluate {source} --model {folder}{split} --output {folder}/report']
    if is_folder:
        image = shlex.quote(_shorten(data.val.name(0)))
        commands.insert(0, f'predict {image} --model {folder}')
        if eca:
            commands.append(f'gates {source} --model {folder} --output {folder}/gates')
    python = f'timm.create_model({f"local-dir:{_shorten(output)}"!r}, pretrained=True)'
    return [*(f'  timm-eca {command}' for command in commands), f'  in Python: {python}']
