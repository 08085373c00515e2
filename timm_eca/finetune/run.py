"""Fine-tunes a model on images, and writes a folder for timm and the Hub (extra `finetune`).

For recipes that it lacks, use timm's `train.py` with `timm-eca run`.
"""
import errno
import json
import os
import pickle
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, gather_object, set_seed,
)
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from timm import __version__ as timm_version
from timm.models import create_model, save_for_hf

from timm_eca.analysis.evaluate import CONFUSIONS_FILE, MATRIX_FILE, MAX_DRAWN, Evaluation, write_confusions
from timm_eca.analysis.figures import draw_confusion, draw_curves
from timm_eca.analysis.gates import has_eca
from timm_eca.analysis.tables import write_csv
from timm_eca.errors import first_line
from timm_eca.finetune.examples import list_all, read_all, split_sources
from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.settings import FinetuneError, Settings, as_option
from timm_eca.finetune.trainer import Trainer, is_stalled, on_main
from timm_eca.images.batches import name_of
from timm_eca.images.digits import DIGITS
from timm_eca.images.folders import some
from timm_eca.images.sources import Sources, open_sources
from timm_eca.version import __version__
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.card import finetuned_card
from timm_eca.weights.digests import digest, file_sha256, make_metadata, save_weights
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, REPORT_FILES, WEIGHTS_FILE

__all__ = ['finetune']

CHECKPOINT_FILE = 'checkpoints/timm_eca.pt'
LOCK_FILE = 'checkpoints/.timm_eca-lock'
LOG_FOLDER = 'checkpoints/log'  # of a tracker
TABLE_FILE, CURVES_FILE = 'metrics.csv', 'curves.png'
# What a fine-tuned model doesn't inherit from the weights that it started from.
_DESCRIPTION = dict.fromkeys((
    'tag', 'license', 'origin_url', 'description', 'notes', 'hf_hub_id', 'label_names', 'label_descriptions'))


def finetune(settings: Settings) -> Path:
    """Fine-tunes a model.

    The folder `settings.output` gets `model.safetensors`, `config.json` and `README.md` of the epoch with the highest
    validation accuracy. Then it gets `metrics.csv`, `curves.png` and `confusion_matrix.png`, or for more than 100
    classes `confusions.csv`. The state of the training is in its `checkpoints/timm_eca.pt`, written after each epoch.
    Under `accelerate launch` and `torchrun` all their processes train.

    Args:
        settings: What to do.

    Returns:
        The folder.

    Raises:
        ImageError: The images can't be trained on.
        UnknownModelError: There is no such model.
        FinetuneError: The settings are not possible, the folder can't be written, or the training fails.
        WeightsNotFoundError: There are no pretrained weights.
    """
    settings.check()
    accelerator = _make_accelerator(settings)
    report = accelerator.on_main_process(print)
    if settings.workers is None:
        cpus = os.cpu_count() or 1
        settings = replace(settings, workers=4 if accelerator.device.type != 'cpu' else min(4, cpus // 4))
    sources = open_sources(
        settings.data, settings.dataset_cache, settings.train_split, settings.val_split, settings.in_chans)
    data = _read_images(accelerator, settings, sources, report)
    model_name = settings.model.rstrip('/').rpartition('/')[2].rpartition(':')[2]
    output = Path(os.path.abspath(settings.output or f'{model_name}-{data.name.replace("/", "-")}'))
    if output.is_relative_to(os.path.abspath(settings.data)):
        raise FinetuneError(f'The output {output} would be among the images', 'name another --output')
    set_seed(settings.seed)
    model, start = create_with_weights(settings, data.class_names)
    # What has to be the same when a run continues, as JSON has it.
    written = json.loads(json.dumps({
        **settings.written(), 'data': f'{data.name} ({sources.fingerprint})',
        'amp_dtype': {'fp16': 'float16', 'bf16': 'bfloat16'}.get(accelerator.mixed_precision)}))
    earlier = _read_checkpoint(settings, written, output, len(data.class_names))
    if earlier is not None and _is_whole(output, len(data.class_names)):
        rows = earlier['rows']
        if len(rows) >= settings.epochs or is_stalled([row['top1'] for row in rows], settings.patience):
            report(f'{output} is finished, after {len(rows)} epochs.')
            return output
    trainer = Trainer(accelerator, settings, model, data, report)
    with ExitStack() as stack:
        on_main(accelerator, lambda: _claim_output(settings, output, stack))
        trainer.describe(start)
        accelerator.project_configuration.logging_dir = str(output / LOG_FOLDER)
        accelerator.init_trackers(output.name, {name: str(value) for name, value in written.items()})
        about = {'settings': written, 'command': ' '.join(_words(settings, output))}
        try:
            if earlier is not None:
                with _reading(output / CHECKPOINT_FILE):
                    trainer.resume(earlier)
            trainer.run(lambda state: _save(output / CHECKPOINT_FILE, about | state))
        except KeyboardInterrupt:
            command = f'The same command{" without --force" * settings.force}'
            report(f'Stopped after epoch {trainer.saved}. {command} continues the run.')
            raise
        trainer.network.load_state_dict(trainer.best_weights)
        if settings.recompute_statistics:
            trainer.recompute_statistics()
        evaluation = trainer.evaluate(trainer.network)
        on_main(accelerator, lambda: _finish(output, trainer, evaluation, start))
    skipped = sorted(set(gather_object(data.train.skipped + trainer.val_loader.dataset.skipped)))
    if skipped:
        report(f'Warning: {len(skipped)} images could not be read, and the next ones were taken: {some(skipped)}.')
    accelerator.end_training()
    report(f'{output}: {evaluation.accuracy}, of epoch {trainer.best["epoch"]}')
    report('\n'.join(['Next:', *_next_commands(settings, output, data, has_eca(trainer.network))]))
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


def _read_images(
        accelerator: Accelerator, settings: Settings, sources: Sources, report: Callable[[str], None]) -> Sources:
    datasets = [dataset for dataset in (sources.train, sources.val) if dataset is not None]
    read = partial(read_all, workers=settings.workers or 0) if settings.check_images else list_all
    found = on_main(accelerator, lambda: [read(dataset) for dataset in datasets])
    data = split_sources(sources, found, settings.val_fraction, settings.seed)
    if not settings.check_images:  # fail now if there is no image at all
        _ = data.train[0], data.val[0]
    for note in data.notes:
        report(f'Warning: {note}')
    return data


def _is_whole(output: Path, classes: int) -> bool:
    """Whether a folder has all files of a finished run."""
    confusions = MATRIX_FILE if classes <= MAX_DRAWN else CONFUSIONS_FILE
    return all((output / name).is_file() for name in (CONFIG_FILE, TABLE_FILE, CURVES_FILE, confusions))


def _read_checkpoint(
        settings: Settings, written: dict[str, Any], output: Path, classes: int) -> dict[str, Any] | None:
    """The state to continue from, if there is one. Refuses a folder with other things."""
    path = output / CHECKPOINT_FILE
    if not path.exists():
        found = {*output.glob('[!.]*'), *path.parent.glob('[!.]*')}
        if found - {path.parent, output / LOG_FOLDER}:  # a run that ended in its first epoch leaves these
            raise FinetuneError(f'{output} exists and holds no run that can continue', 'name another --output')
        return None
    if settings.force:
        return None
    if _is_whole(output, classes) and not settings.extend:
        raise FinetuneError(
            f'{output} holds a finished run',
            'name another --output, replace it with --force, or continue with --extend and more --epochs')
    with _reading(path):
        state = torch.load(path, map_location='cpu', weights_only=True)
        earlier, _ = {**state['settings']}, [row['top1'] for row in state['rows']]
    different = [name for name in written if earlier.get(name) != written[name]]
    if different:
        named = ', '.join(
            as_option(name, earlier.get(name)) if name != 'data' else f'images {earlier.get(name)}'
            for name in different)
        raise FinetuneError(
            f'{output} holds a run with other settings ({named})',
            'give these, name another --output, or replace it with --force')
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an error from a damaged state file into a sentence."""
    try:
        yield
    except (  # what torch, pickle and wrong contents raise
            AttributeError, EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
            pickle.UnpicklingError) as e:
        raise FinetuneError(
            f'{path} is damaged ({type(e).__name__}: {first_line(e)})', 'start again with --force') from e


def _claim_output(settings: Settings, output: Path, stack: ExitStack) -> None:
    """Makes the folder, locks it until the stack is closed, and removes files of an earlier run."""
    path, lock = output / CHECKPOINT_FILE, output / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(WeakFileLock(lock, timeout=1))
    except Timeout as e:
        raise FinetuneError(
            f'Another run is writing to {output}',
            f'name another --output, or wait for that run. If there is none, remove {lock}') from e
    if settings.force:
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *REPORT_FILES):
            (output / name).unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # last: it shows that the folder is ours
    for leftover in path.parent.glob(f'.{path.name}.timm_eca-*'):  # of a process that was killed
        leftover.unlink()


def _save(path: Path, state: dict[str, Any]) -> None:
    try:
        atomic_write(path, lambda new: torch.save(state, new))
    except RuntimeError as e:  # torch raises it on a full disk
        raise OSError(errno.ENOSPC, first_line(e), str(path)) from e


def _finish(output: Path, trainer: Trainer, evaluation: Evaluation, start: str) -> None:
    """Writes the folder for timm and the Hub from the best weights, and then the reports."""
    gates = trainer.describe_gates()
    if gates:
        trainer.report(gates)
    rows, names = trainer.rows, trainer.data.class_names
    network = trainer.network.cpu().to(memory_format=torch.contiguous_format)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    new = output / '.timm_eca.new'
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        _write_folder(new, output, network, trainer, evaluation, start, gates)
        for name in (CARD_FILE, WEIGHTS_FILE, CONFIG_FILE):  # the config last: a folder with it can be loaded
            os.replace(new / name, output / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    write_csv(output / TABLE_FILE, [
        list(rows[0]), *([f'{value:.6g}' for value in row.values()] for row in rows)])
    draw_curves(output / CURVES_FILE, rows, trainer.best['epoch'])
    if len(names) <= MAX_DRAWN:
        draw_confusion(output / MATRIX_FILE, evaluation.confusion_matrix(), names)
    else:
        write_confusions(output / CONFUSIONS_FILE, evaluation)


def _write_folder(
        new: Path,
        output: Path,
        network: nn.Module,
        trainer: Trainer,
        evaluation: Evaluation,
        start: str,
        gates: str | None,
) -> None:
    data, rows, names, state_dict = trainer.data, trainer.rows, trainer.data.class_names, network.state_dict()
    save_for_hf(
        network, str(new), safe_serialization=True, data_config=trainer.data_config,
        model_config={'label_names': list(names), 'pretrained_cfg': _DESCRIPTION})
    config = json.loads((new / CONFIG_FILE).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # transformers gives it, too
    (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    digests = {key: digest(value) for key, value in state_dict.items()}
    metadata = make_metadata(
        digests, config_sha256=file_sha256(new / CONFIG_FILE), source=f'finetune, {data.name}')
    save_weights(state_dict, new / WEIGHTS_FILE, metadata)
    loaded = create_model(f'local-dir:{new}', pretrained=True).state_dict()
    changed = [key for key, value in state_dict.items() if not torch.equal(loaded[key], value)]
    if changed:
        raise FinetuneError(f'{new}: {changed[0]} was read with other bits than were written', 'try again')
    origin: Any = network.pretrained_cfg
    card = finetuned_card(
        deepcopy(network).to('meta'), config, start=start, data_name=data.name, epochs=len(rows),
        best_epoch=int(trainer.best['epoch']), metrics=evaluation.metrics, train_count=len(data.train),
        val_count=len(evaluation.results), class_scores=[(s.name, s.images, s.recall) for s in evaluation.by_class()],
        command=_card_command(trainer.settings, output, data.name, trainer.planned), gates=gates,
        worst_pairs=None if len(names) <= MAX_DRAWN else evaluation.worst_pairs(),
        license=origin.get('license'), base_model=origin.get('hf_hub_id'))
    (new / CARD_FILE).write_text(card, encoding='utf-8')


def _words(settings: Settings, output: Path, data_name: str | None = None) -> list[str]:
    """The words of the command of a run. With a name for the data, it has no paths of this machine."""
    private = data_name is None
    suited = Settings.suited(settings.data, model=settings.model, pretrained=settings.pretrained)
    data = os.path.abspath(settings.data) if os.path.isdir(settings.data) else settings.data
    words = ['timm-eca finetune', shlex.quote(data_name or data)]
    for option in fields(Settings)[1:]:
        name, value = option.name, getattr(settings, option.name)
        default = option.default if name in ('model', 'pretrained') else getattr(suited, name)
        if name == 'output':
            value = str(output) if private else output.name
        elif name in ('extend', 'force') or value == default or (
                option.metadata.get('free') and not private and name != 'epochs'):
            continue
        elif name in ('initial_checkpoint', 'model', 'dataset_cache'):
            path = Path(value.removeprefix('local-dir:'))
            if path.exists():
                value = os.path.abspath(path) if private else path.name
        words.append(as_option(name, value))
    return words


def _card_command(settings: Settings, output: Path, data_name: str, planned: Sequence[int]) -> str:
    """The command of a run, and the versions that it ran with."""
    words, different = _words(replace(settings, epochs=planned[-1]), output, data_name), dict.fromkeys(planned)
    command = ' '.join(words) + f'  # timm_eca {__version__}, timm {timm_version}, torch {torch.__version__}'
    if len(different) > 1:
        command += (
            '\n# No single command repeats this run: it continued with other --epochs, in turn '
            f'{", ".join(map(str, different))}, and each has its own schedule.')
    return command


def _next_commands(settings: Settings, output: Path, data: Sources, eca: bool) -> list[str]:
    """Commands that use the folder."""
    folder, source = shlex.quote(settings.output or output.name), shlex.quote(settings.data)
    split = f' --split {shlex.quote(settings.val_split)}' if settings.val_split else ''
    commands = [f'evaluate {source} --model {folder}{split} --output {folder}/report']
    if os.path.isdir(settings.data):
        image = name_of(data.val.dataset, data.val.indices[0])
        commands.insert(0, f'predict {shlex.quote(image)} --model {folder}')
        if eca:
            commands.append(f'gates {source} --model {folder} --output {folder}/gates')
    elif data.name == DIGITS:
        commands = [f'evaluate {source} --model {folder}']
    return [f'  timm-eca {command}' for command in commands]
