"""`timm-eca finetune`, on folders of images that these tests draw, and on scikit-learn's digits."""
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import PIL
import pytest
import torch
from helpers.forked import fork, wait
from helpers.hub_double import HubDouble
from helpers.image_folders import COLOURS, FAST, MODEL, draw
from helpers.official_files import official_state_dict, save_official
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from huggingface_hub.utils import WeakFileLock
from timm.layers import convert_sync_batchnorm
from timm.models import create_model, save_for_hf
from timm.optim import create_optimizer_v2, list_optimizers

from timm_eca import param_groups
from timm_eca.commands.main import main

pytest.importorskip('accelerate')
pytest.importorskip('sklearn')

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from timm_eca.finetune.initial_weights import create_with_weights
from timm_eca.finetune.run import _make_accelerator
from timm_eca.finetune.settings import FinetuneError, Settings
from timm_eca.finetune.trainer import is_stalled, on_main

ROOT = Path(__file__).parents[2]
FILES = {'README.md', 'config.json', 'model.safetensors', 'metrics.csv', 'curves.png', 'confusion_matrix.png'}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return draw(tmp_path / 'fruit', {'red': 10, 'green': 15, 'yellow': 10})


@pytest.fixture
def figures() -> None:
    """For a test that looks at the figures. They take most of the time of a short run."""


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if 'figures' not in request.fixturenames:
        for name in ('draw_curves', 'draw_confusion'):
            monkeypatch.setattr(f'timm_eca.finetune.run.{name}', lambda path, *args: path.touch())


def run(*args: str | Path) -> int:
    return main(['finetune', *map(str, args)])


class Stopper(io.StringIO):
    """An output that raises an exception when a text is printed."""

    def __init__(self, text: str, error: type[BaseException]) -> None:
        super().__init__()
        self.text, self.error = text, error

    def write(self, text: str) -> int:
        if self.text in text and self.text not in self.getvalue():
            super().write(text)
            raise self.error
        return super().write(text)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / 'metrics.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def test_from_a_folder_of_images_to_the_hub(
        tree: Path, tmp_path: Path, hub: HubDouble, figures: None, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / 'out'
    status = run(tree, *FAST, '--epochs', '3', '--output', output, '--push-to-hub', 'timm-eca/fruit')
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert '28 images to train on, 7 to validate on, 3 classes' in printed.out
    lines = printed.out.splitlines()
    start = lines.index('epoch  learning rate  train loss  val loss   top-1  seconds')
    columns = [match.end() for match in re.finditer(r'\w+(?: \w+)?(?:-1)?', lines[start])]
    # On a slow machine there are reports of batches between them.
    table_lines = [line for line in lines[start + 1:] if re.match(r' {4}\d ', line)]
    assert len(table_lines) == 3
    for line in table_lines:
        assert [match.end() for match in re.finditer(r'\S+', line)] == columns
    written = {path.name for path in output.iterdir()}
    assert written == FILES | {'checkpoints'}
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir() if path.is_file()} == {0o666 & ~umask}

    # What the folder holds is what was measured.
    table = rows(output)
    assert [row['epoch'] for row in table] == ['1', '2', '3']
    best = max(table, key=lambda row: float(row['top1']))
    config = json.loads((output / 'config.json').read_text())
    assert config['label_names'] == ['green', 'red', 'yellow']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert 'num_classes' not in config['model_args']
    model = create_model(f'local-dir:{output}', pretrained=True)
    assert model.num_classes == 3
    card = ModelCard.load(output / 'README.md')
    assert card.data.eval_results[0].metric_value == pytest.approx(float(best['top1']), abs=0.01)
    assert 'in 3 epochs' in card.content
    assert 'random weights' in card.content
    assert 'top5' not in table[0]  # of three classes
    assert 'top-5' not in printed.out + card.content
    for text in (printed.out, card.content):
        assert re.search(r'Channel weights over 7 validation images: 0\.\d+ to 0\.\d+, standard deviation', text)
    for name in ('curves.png', 'confusion_matrix.png'):
        with Image.open(output / name) as image:
            assert image.size > (400, 400)
            assert len(set(image.convert('L').resize((50, 50)).tobytes())) > 10

    repo = hub.repos['timm-eca/fruit']
    assert set(repo.head().files) - {'.gitattributes'} == FILES
    assert hub.token not in printed.out + printed.err

    commands = [shlex.split(line)[1:] for line in lines[lines.index('Next:') + 1:] if line.startswith('  timm-eca ')]
    assert [command[0] for command in commands] == ['predict', 'evaluate', 'gates']
    for command in commands:
        assert main(command) == 0
    printed = capsys.readouterr().out
    assert '35 images: top-1' in printed
    assert {path.name for path in (output / 'gates').iterdir()} == {'gates.csv', 'gates.png', 'gates.safetensors'}
    assert (output / 'report' / 'confusion_matrix.png').exists()


@pytest.mark.slow
def test_the_accuracy_is_that_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw(tmp_path / 'data' / 'train', {'red': 8, 'green': 8})
    val = draw(tmp_path / 'data' / 'val', {'red': 4, 'green': 5})
    assert run(tmp_path / 'data', *FAST, '--epochs', '2', '--output', tmp_path / 'out', '--crop-pct', '1') == 0
    capsys.readouterr()
    assert main(['predict', str(val), '--model', str(tmp_path / 'out'), '--json']) == 0
    predictions = json.loads(capsys.readouterr().out)
    right = sum(Path(row['image']).parent.name == row['predictions'][0]['name'] for row in predictions)
    best = max(float(row['top1']) for row in rows(tmp_path / 'out'))
    assert 100 * right / len(predictions) == pytest.approx(best)


def test_transformers_load_the_folder(tree: Path, tmp_path: Path):
    transformers = pytest.importorskip('transformers')
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
    ours = create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(x).logits, ours(x), rtol=1e-5, atol=1e-5)
    theirs = model.timm_model.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in ours.state_dict().items())
    assert model.config.id2label[1] == 'red'


def test_another_attention(tree: Path, tmp_path: Path):
    """The folder has the attention and the kernel sizes of the folder that it started from, or of the options."""
    save_for_hf(create_model(MODEL, attn_layer='se'), tmp_path / 'se')
    common = [tree, *FAST, '--epochs', '1', '--output']
    assert run(*common, tmp_path / 'a', '--model', tmp_path / 'se') == 0
    assert run(*common, tmp_path / 'b', '--model-kwargs', 'kernel_sizes=5', 'attn_layer=eca_ns') == 0
    for name, args in (('a', {'attn_layer': 'se'}), ('b', {'kernel_sizes': 5, 'attn_layer': 'eca_ns'})):
        found = json.loads((tmp_path / name / 'config.json').read_text())['model_args']
        assert found | args == found
    assert '--model-kwargs kernel_sizes=5 attn_layer=eca_ns' in (tmp_path / 'b' / 'README.md').read_text()


@pytest.mark.parametrize(('text', 'saved'), [('epoch  learning rate', 0), ('    1  ', 1)])
def test_ctrl_c(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, saved: int):
    """The same command continues the run, and so does the command that the state file has."""
    output = tmp_path / 'a folder'
    command = [tree, *FAST, '--epochs', '2', '--hflip', '0.25', '--output', output]
    with redirect_stdout(Stopper(text, KeyboardInterrupt)) as printed:
        assert run(*command) == 130
    assert f'Stopped after epoch {saved}. The same command continues the run.' in printed.getvalue()
    assert not (output / 'config.json').exists()
    if saved:
        words = shlex.split(torch.load(output / 'checkpoints' / 'timm_eca.pt')['command'])
        assert words[:3] == ['timm-eca', 'finetune', str(tree)]
        assert main(words[1:]) == 0
    else:
        assert run(*command) == 0
    assert ('Continuing after epoch 1' in capsys.readouterr().out) == bool(saved)
    assert len(rows(output)) == 2


def test_two_runs_in_one_folder(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out']
    (tmp_path / 'out' / 'checkpoints').mkdir(parents=True)
    with WeakFileLock(tmp_path / 'out' / 'checkpoints' / '.timm_eca-lock'):
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert f'Another run is writing to {tmp_path / "out"}' in error
        assert error.count('\n') == 1
    assert run(*command) == 0


def test_what_is_told_without_a_terminal(
        tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter(range(0, 10 ** 6, 40))  # seconds
    monkeypatch.setattr('timm_eca.finetune.trainer.time.monotonic', lambda: next(clock))
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    assert re.search(r'epoch 1: \d of 3 batches, loss \d\.\d{4}', capsys.readouterr().out)


def test_the_learning_rate_of_an_epoch(tree: Path, tmp_path: Path):
    common = [tree, *FAST, '--epochs', '2', '--warmup-epochs', '0', '--lr', '0.01']
    assert run(*common, '--attn-lr-scale', '30', '--output', tmp_path / 'cosine') == 0
    rates = [0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]  # before each of six steps
    assert [float(row['lr']) for row in rows(tmp_path / 'cosine')] == [
        pytest.approx(sum(part) / 3, rel=1e-4) for part in (rates[:3], rates[3:])]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    [],
    ['--model-ema', '--mixup', '0.2', '--cutmix', '1.0', '--drop', '0.2', '--aa', 'rand-m5-n1', '--reprob', '0.5',
     '--grad-accum-steps', '2', '--opt', 'sgd', '--sched', 'step', '--workers', '1', '--patience', '9'],
], ids=['plain', 'everything random'])
def test_resuming_gives_the_same_bits(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]):
    command = [tree, *FAST, '--epochs', '3', *options, '--output']
    assert run(*command, tmp_path / 'whole') == 0
    with redirect_stdout(Stopper('    1  ', Killed)), pytest.raises(Killed):
        run(*command, tmp_path / 'parts')
    assert not (tmp_path / 'parts' / 'config.json').exists()
    (tmp_path / 'parts' / 'checkpoints' / '.timm_eca.pt.timm_eca-1234.pt').touch()  # where it was killed while writing
    capsys.readouterr()
    assert run(*command, tmp_path / 'parts', '--extend') == 0
    assert 'Continuing after epoch 1,' in capsys.readouterr().out
    assert [{k: v for k, v in row.items() if k != 'seconds'} for row in rows(tmp_path / 'whole')] == [
        {k: v for k, v in row.items() if k != 'seconds'} for row in rows(tmp_path / 'parts')]
    whole, parts = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'parts'))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert {path.name for path in (tmp_path / 'parts').iterdir()} == FILES | {'checkpoints'}
    assert {path.name for path in (tmp_path / 'parts' / 'checkpoints').iterdir()} <= {'timm_eca.pt', '.timm_eca-lock'}

    # Again: nothing is left to do, with --extend, and nothing is lost without.
    before = (tmp_path / 'parts' / 'model.safetensors').read_bytes()
    capsys.readouterr()
    assert run(*command, tmp_path / 'parts', '--extend') == 0
    assert 'is finished, after 3 epochs' in capsys.readouterr().out
    assert (tmp_path / 'parts' / 'model.safetensors').read_bytes() == before
    assert run(*command, tmp_path / 'parts') == 2
    assert '--force' in capsys.readouterr().err


def test_an_unfinished_run(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / 'out'
    assert run(tree, *FAST, '--epochs', '1', '--output', output) == 0
    (output / 'config.json').unlink()  # as if killed before the last file was there
    assert run(tree, *FAST, '--epochs', '1', '--output', output, '--lr', '0.5') == 2
    error = capsys.readouterr().err
    assert '--lr 0.002' in error
    assert error.count('\n') == 1
    assert run(tree, *FAST, '--epochs', '1', '--output', output) == 0  # the same command goes on
    assert run(tree, *FAST, '--epochs', '2', '--output', output, '--extend') == 0
    assert len(rows(output)) == 2
    for name in ('notes.txt', 'checkpoints/mine.pt'):
        (output / name).write_text('')
    assert run(tree, *FAST, '--epochs', '1', '--output', output, '--lr', '0.5', '--force') == 0
    assert (output / 'notes.txt').exists()
    assert (output / 'checkpoints' / 'mine.pt').exists()
    for name in ('mine/thesis.txt', 'theirs/checkpoints/best.pth', 'others/checkpoints/last.pt'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('')
        for force in ([], ['--force']):
            assert run(tree, *FAST, '--output', tmp_path / name.partition('/')[0], *force) == 2
            assert (tmp_path / name).exists()


def test_damaged_checkpoint(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / 'out'
    assert run(tree, *FAST, '--epochs', '1', '--output', output) == 0
    path = output / 'checkpoints' / 'timm_eca.pt'
    whole = path.read_bytes()
    state = torch.load(path)
    tensors = {key: value[:1] for key, value in state['parts']['network'].items() if value.dim()}
    for content in (
            b'rubbish', whole[:-1000], {'settings': [1]}, {**state, 'rows': 5}, {**state, 'planned': []},
            {**state, 'parts': {}}, {**state, 'parts': {**state['parts'], 'network': tensors}}):
        torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
        capsys.readouterr()
        assert run(tree, *FAST, '--epochs', '2', '--output', output, '--extend') == 2
        error = capsys.readouterr().err
        assert f'{path} is damaged' in error
        assert '--force' in error


def test_a_checkpoint_runs_no_code(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [tree, *FAST, '--model-ema', '--epochs', '1', '--output', tmp_path / 'out']
    assert run(*command) == 0

    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / 'ran',)

    path = tmp_path / 'out' / 'checkpoints' / 'timm_eca.pt'
    state = torch.load(path)
    state['parts']['ema'] = Hostile()
    torch.save(state, path)
    assert run(*command, '--extend') == 2
    assert '--force' in capsys.readouterr().err
    assert not (tmp_path / 'ran').exists()


@pytest.mark.slow
def test_the_parts_of_a_recipe(tree: Path, tmp_path: Path):
    common = [tree, *FAST, '--epochs', '1', '--seed', '3']

    def weights(name: str, *options: str) -> dict[str, torch.Tensor]:
        assert run(*common, *options, '--output', tmp_path / name) == 0
        return _weights(tmp_path / name)

    plain = weights('plain')
    same = weights('same')
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    for name, options in {
        'seed': ['--seed', '4'], 'smoothing': ['--smoothing', '0'], 'weights': ['--class-weights', 'balanced'],
        'layers': ['--layer-decay', '0.7'], 'clip': ['--clip-grad', '0.1'], 'accumulation': ['--grad-accum-steps', '2'],
        'ema': ['--model-ema', '--model-ema-decay', '0.5'], 'schedule': ['--sched', 'constant'],
        'optimizer': ['--opt', 'lamb'], 'flip': ['--vflip', '1'], 'mixup': ['--mixup', '0.8'],
        'attention': ['--attn-lr-scale', '10'],
    }.items():
        other = weights(name, *options)
        assert not torch.equal(plain['classifier.weight'], other['classifier.weight']), name

    start = plain
    frozen = weights('frozen', '--initial-checkpoint', str(tmp_path / 'plain'), '--freeze', 'backbone', '--lr', '0.01')
    for key in start:
        assert torch.equal(start[key], frozen[key]) == (not key.startswith('classifier.')), key
    part = weights('part', '--initial-checkpoint', str(tmp_path / 'plain'), '--freeze', 'conv_stem,bn1,blocks.0')
    assert torch.equal(start['blocks.0.0.bn1.running_mean'], part['blocks.0.0.bn1.running_mean'])
    assert not torch.equal(start['blocks.1.0.bn1.running_mean'], part['blocks.1.0.bn1.running_mean'])


def test_statistics_are_recomputed(tree: Path, tmp_path: Path):
    """In one pass over the three batches: the weights stay, the norms count from 0, also those before ECA."""
    command = [tree, *FAST, '--epochs', '2', '--output']
    assert run(*command, tmp_path / 'plain') == 0
    assert run(*command, tmp_path / 'again', '--recompute-statistics') == 0
    plain, again = _weights(tmp_path / 'plain'), _weights(tmp_path / 'again')
    for key, value in again.items():
        if key.endswith('num_batches_tracked'):
            assert value == 3, key
        else:
            assert torch.equal(value, plain[key]) != ('running' in key), key
    assert 'blocks.1.0.bn3.norm.running_mean' in again
    assert '--recompute-statistics' in (tmp_path / 'again' / 'README.md').read_text()


def test_early_stopping(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    constant = ['--freeze', 'backbone', '--lr', '0']
    assert run(tree, *FAST, *constant, '--epochs', '9', '--patience', '2', '--output', tmp_path / 'out') == 0
    assert 'Stopped early' in capsys.readouterr().out
    assert len(rows(tmp_path / 'out')) == 3
    rising = [10, 30, 20, 40, 40, 30]
    assert [is_stalled(rising[:n], 2) for n in range(7)] == [False, False, False, False, False, False, True]
    assert not is_stalled(rising, None)


def test_grey_images(tree: Path, tmp_path: Path):
    assert run(tree, *FAST, '--epochs', '1', '--in-chans', '1', '--output', tmp_path / 'out') == 0
    model = create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert list(model.pretrained_cfg['mean']) == [0.449]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / 'model.safetensors')


def test_a_single_step_trains(tree: Path, tmp_path: Path):
    command = [tree, *FAST, '--epochs', '1', '--batch-size', '64', '--output']
    assert run(*command, tmp_path / 'still', '--lr', '0') == 0
    assert run(*command, tmp_path / 'trained') == 0
    still, trained = _weights(tmp_path / 'still'), _weights(tmp_path / 'trained')
    assert not torch.equal(still['conv_stem.weight'], trained['conv_stem.weight'])


def test_more_epochs(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    card = tmp_path / 'out' / 'README.md'
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    assert 'No single command' not in card.read_text()
    capsys.readouterr()
    assert run(tree, *FAST, '--epochs', '3', '--output', tmp_path / 'out', '--extend') == 0
    printed = capsys.readouterr().out
    assert 'Continuing after epoch 1, at a learning rate of ' in printed
    assert 'The schedule is now that of 3 epochs instead of 1' in printed
    assert 'No single command repeats this run' in card.read_text()
    assert 'in turn 1, 3,' in card.read_text()
    assert run(tree, *FAST, '--epochs', '2', '--output', tmp_path / 'out', '--extend') == 0  # nothing is left to do
    assert 'in turn 1, 3,' in card.read_text()
    assert '--epochs 3 ' in card.read_text()
    assert [float(row['lr']) > 0 for row in rows(tmp_path / 'out')] == [True, True, True]


def test_accumulation_of_a_last_step_with_fewer_batches(tree: Path, tmp_path: Path):
    command = [tree, *FAST, '--epochs', '1', '--opt', 'sgd', '--sched', 'none', '--lr', '0.1', '--output']
    for steps in ('3', '16'):  # of the three batches that there are
        assert run(*command, tmp_path / steps, '--grad-accum-steps', steps) == 0
    three, sixteen = _weights(tmp_path / '3'), _weights(tmp_path / '16')
    for key, value in three.items():
        torch.testing.assert_close(value, sixteen[key], rtol=1e-4, atol=1e-6)


def test_splits_by_other_names(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(tree, tmp_path / 'data' / 'Training')
    shutil.copytree(tree, tmp_path / 'data' / 'Testing')
    common = [tmp_path / 'data', *FAST, '--epochs', '1', '--output']
    assert run(*common, tmp_path / '1') == 0
    assert '28 images to train on, 7 to validate on, 3 classes' in capsys.readouterr().out
    assert run(*common, tmp_path / '2', '--val-split', 'test') == 0
    assert '35 images to train on, 35 to validate on, 3 classes' in capsys.readouterr().out
    assert run(*common, tmp_path / '3', '--train-split', 'trian') == 2
    assert run(*common, tmp_path / '3', '--val-split', 'tset') == 2
    (tmp_path / 'data' / 'Training').rename(tmp_path / 'data' / 'Lessons')
    assert run(*common, tmp_path / '3') == 2
    assert '--train-split' in capsys.readouterr().err


def test_resuming_with_other_classes(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    (tree / 'green').rename(tree / 'zebra')
    assert run(tree, *FAST, '--epochs', '2', '--output', tmp_path / 'out', '--extend') == 2
    assert '(images fruit (' in capsys.readouterr().err


def test_the_options_of_a_run_that_goes_on(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The error names the options that the earlier run had, as they are given."""
    command = [tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out']
    assert run(*command, '--scale', '0.5', '1', '--model-ema') == 0
    assert run(*command, '--extend', '--freeze', 'bn1', '--no-ema') == 2
    assert '(no --no-ema, no --freeze, --model-ema, --scale 0.5 1.0)' in capsys.readouterr().err
    assert run(*command, '--extend', '--scale', '0.5', '1', '--model-ema') == 0


def test_images_of_other_kinds(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for index, kind in enumerate(['gif', 'jfif', 'tiff']):
        with Image.open(tree / 'red' / f'{index}.png') as image:
            image.save(tree / 'red' / f'other.{kind}')
    Image.new('F', (24, 24), 0.5).save(tree / 'red' / 'float.tif')
    for index, mode in enumerate(['1', 'L', 'LA', 'P', 'RGBA', 'CMYK']):
        Image.new(mode, (24, 24)).save(tree / 'green' / f'mode{index}.{"jpg" if mode == "CMYK" else "png"}')
    (tree / 'green').rename(tree / 'US$10_$ |<b>')
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert '1 of 45 images can\'t be read' in printed
    assert '32 bits' in printed
    assert sum(map(int, re.findall(r'(\d+) (?:images to train|to validate) on', printed))) == 44
    assert 'US$10_$ \\|&lt;b>' in (tmp_path / 'out' / 'README.md').read_text()


def test_frozen_backbones_of_other_kinds(tree: Path, tmp_path: Path):
    data = [tree, '--no-pretrained', '--workers', '0', '--batch-size', '8', '--epochs', '1', '--freeze', 'backbone']
    assert run(*data, '--model', 'test_vit', '--output', tmp_path / 'vit', '--lr', '0.1') == 0
    assert run(*data, '--model', 'test_vit', '--output', tmp_path / 'still', '--lr', '0') == 0
    trained, still = _weights(tmp_path / 'vit'), _weights(tmp_path / 'still')
    assert {key for key in still if not torch.equal(still[key], trained[key])} == {'head.weight', 'head.bias'}


def test_preprocessing_is_kept(tree: Path, tmp_path: Path):
    source = create_model(MODEL, num_classes=3)
    save_for_hf(
        source, tmp_path / 'source', safe_serialization=True,
        model_config={'label_names': ['a', 'b', 'c'], 'pretrained_cfg': {'crop_mode': 'squash'}})
    name = f'local-dir:{tmp_path / "source"}'
    assert run(tree, *FAST[3:], '--model', name, '--epochs', '1', '--output', tmp_path / 'out') == 0
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['pretrained_cfg']['crop_mode'] == 'squash'
    assert config['label_names'] == ['green', 'red', 'yellow']
    assert not config['pretrained_cfg'].get('label_names')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'From source, on' in card
    assert '--model source ' in card
    assert 'squash' in card
    assert str(tmp_path) not in card


def _starts(tmp_path: Path) -> dict[str, tuple[str, dict[str, torch.Tensor], float]]:
    """Weights of all kinds: their path, what the model should start from, and the factor of the norms before ECA."""
    torch.manual_seed(1)
    plain = create_model('mobilenetv2_050', num_classes=5)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in plain.state_dict().items()}}, tmp_path / 'wrapped.pth')
    headless = {k: v for k, v in plain.state_dict().items() if not k.startswith('classifier')}
    torch.save(headless, tmp_path / 'backbone.pth')
    eca = create_model(MODEL, num_classes=5)
    save_for_hf(eca, tmp_path / 'folder', safe_serialization=True)
    save_for_hf(plain, tmp_path / 'plain folder', safe_serialization=True)
    return {
        'plain.pth': ('plain.pth', plain.state_dict(), 2),
        'plain.safetensors': ('plain.safetensors', plain.state_dict(), 2),
        'wrapped': ('wrapped.pth', plain.state_dict(), 2), 'backbone': ('backbone.pth', plain.state_dict(), 2),
        'folder': ('folder', eca.state_dict(), 1), 'plain folder': ('plain folder', plain.state_dict(), 2),
    }


def test_weights_to_start_from(tmp_path: Path):

    for name, (path, source, factor) in _starts(tmp_path).items():
        settings = Settings('digits', model=MODEL, initial_checkpoint=str(tmp_path / path))
        model, start = create_with_weights(settings, 'abc')
        assert path.partition('.')[0] in start, name
        assert ('warm start' in start) == (factor == 2), name
        weights = model.state_dict()
        norm = 'blocks.1.0.bn3.norm.weight'
        plain = source.get('blocks.1.0.bn3.weight', source.get(norm))
        assert torch.equal(weights[norm], factor * plain), name
        assert torch.equal(weights['conv_stem.weight'], source['conv_stem.weight']), name
        assert weights['classifier.weight'].shape == (3, 1280)
    official = save_official(tmp_path / 'o.pth.tar', official_state_dict('eca_resnet18'))
    settings = Settings('digits', model='eca_resnet18', initial_checkpoint=str(official))
    model, _ = create_with_weights(settings, '0123456789')
    expected = official_state_dict('eca_resnet18')['layer1.0.eca.conv.weight']
    assert torch.equal(model.state_dict()['layer1.0.bn2.attn.conv.weight'], expected)
    # The plain model takes the same files, for comparisons.
    settings = Settings('digits', model='mobilenetv2_050', initial_checkpoint=str(tmp_path / 'backbone.pth'))
    model, _ = create_with_weights(settings, 'abc')
    weights = torch.load(tmp_path / 'backbone.pth')
    assert torch.equal(model.state_dict()['conv_stem.weight'], weights['conv_stem.weight'])


def test_weights_for_the_model_of_a_folder(tmp_path: Path):
    """The folder says which model, the checkpoint has its weights."""
    models = [create_model('eca_test_resnet', num_classes=3, kernel_sizes=5) for _ in 'ab']
    for model, name in zip(models, 'ab'):
        save_for_hf(model, tmp_path / name, model_config={'label_names': ['x', 'y', 'z']})
    torch.save(models[1].state_dict(), tmp_path / 'b.pth')
    for checkpoint in ('b', 'b.pth'):
        settings = Settings('digits', model=str(tmp_path / 'a'), initial_checkpoint=str(tmp_path / checkpoint))
        model, start = create_with_weights(settings, 'xyz')
        assert checkpoint in start
        assert all(torch.equal(value, models[1].state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(('name', 'content', 'cure'), [
    ('missing.pth', None, 'does not exist'),
    ('rubbish.pth', b'rubbish', 'name a checkpoint'),
    ('rubbish.safetensors', b'rubbish', 'name a checkpoint'),
    ('empty', Path, 'name the file itself'),
    ('resnet.pth', 'resnet18', 'name weights of this model'),
    ('part.pth', 'part', 'lacks'),
    ('views.pth', 'views', 'needs more bytes'),
])
def test_bad_weights_to_start_from(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: object, cure: str):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is Path:
        path.mkdir()
    elif content == 'part':
        state_dict = create_model('mobilenetv2_050').state_dict()
        torch.save({k: v for k, v in state_dict.items() if not k.startswith('blocks.3')}, path)
    elif content == 'views':
        state_dict = create_model('mobilenetv2_050').state_dict()
        torch.save(state_dict | {'blocks.0.0.bn2.weight': torch.zeros(1).expand(2 ** 40)}, path)
    elif isinstance(content, str):
        torch.save(create_model(content).state_dict(), path)
    for model in (MODEL, 'mobilenetv2_050'):
        status = run(tree, '--model', model, '--initial-checkpoint', path, '--output', tmp_path / 'out')
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 2
        assert cure in error
        assert name in error
        assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('model', ['eca_resnet50', 'eca_regnety_004', 'resnet18', 'test_vit'])
def test_pretrained_weights_that_cant_be_had(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    assert run(tree, '--model', model, '--output', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert '--no-pretrained' in error
    assert '--initial-checkpoint' in error
    assert not (tmp_path / 'out').exists()


def _spoil(kind: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        if kind == 'no images':
            shutil.rmtree(folder)
            (folder / 'red').mkdir(parents=True)
        elif kind == 'no class folders':
            for path in folder.rglob('*.png'):
                path.rename(folder / f'{path.parent.name}{path.name}')
            for path in folder.iterdir():
                if path.is_dir():
                    path.rmdir()
        elif kind == 'one class':
            shutil.rmtree(folder / 'green')
            shutil.rmtree(folder / 'yellow')
        elif kind == 'empty class':
            (folder / 'blue').mkdir()
        elif kind == 'all of a class corrupt':
            for path in (folder / 'red').iterdir():
                path.write_bytes(path.read_bytes()[:40])
        elif kind == 'all corrupt':
            for path in folder.rglob('*.png'):
                path.write_bytes(b'')
        elif kind == 'one image in a class':
            for path in list((folder / 'red').iterdir())[1:]:
                path.unlink()
        elif kind == 'a class that train lacks':
            shutil.copytree(folder, folder / 'train')
            draw(folder / 'val', {'red': 2, 'blue': 2})
        elif kind == 'empty val':
            shutil.copytree(folder, folder / 'train')
            (folder / 'val' / 'red').mkdir(parents=True)
        elif kind == 'not there':
            shutil.rmtree(folder)
        elif kind == 'a file':
            shutil.rmtree(folder)
            folder.write_text('')
    return spoil


@pytest.mark.parametrize('kind', [
    'no images', 'no class folders', 'one class', 'empty class', 'all of a class corrupt', 'all corrupt',
    'one image in a class', 'a class that train lacks', 'empty val', 'not there', 'a file',
])
def test_bad_images(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    _spoil(kind)(tree)
    assert run(tree, *FAST, '--output', tmp_path / 'out') == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    assert 'fruit' in captured.err
    assert not (tmp_path / 'out').exists()


def test_corrupt_images_are_counted_and_left_out(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tree / 'red' / '3.png').write_bytes((tree / 'red' / '3.png').read_bytes()[:60])
    (tree / 'green' / '1.jpg').write_text('no picture')
    (tree / '.cache').mkdir()
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert '2 of 36 images can\'t be read and are left out' in printed
    assert '1.jpg' in printed
    assert sum(map(int, re.findall(r'(\d+) (?:images to train|to validate) on', printed))) == 34


def test_a_class_without_validation_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw(tmp_path / 'data' / 'training', {'red': 4, 'green': 4})
    draw(tmp_path / 'data' / 'valid', {'red': 2})
    assert run(tmp_path / 'data', *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    assert '1 classes have no images to validate on, the first is \'green\'' in capsys.readouterr().out


@pytest.mark.parametrize(('options', 'cure'), [
    (['--epochs', '0'], '--epochs'), (['--batch-size', '0'], '--batch-size'), (['--lr', '-1'], '--lr'),
    (['--lr', 'nan'], '--lr'), (['--val-fraction', '1'], '--val-fraction'), (['--scale', '1', '0.5'], '--scale'),
    (['--smoothing', '2'], '--smoothing'), (['--mixup', '1', '--batch-size', '7'], 'even'),
    (['--freeze', 'head'], 'conv_stem'), (['--in-chans', '2'], '1 or 3'), (['--mean', '0.5', '0.5'], '--mean'),
    (['--lr', '1e30', '--opt', 'sgd', '--warmup-epochs', '0'], '--lr'),
    (['--std', '0'], '--std'), (['--amp', '--amp-dtype', 'float16', '--device', 'cpu'], 'bfloat16'),
    (['--batch-size', '1'], '--batch-size'),
    (['--attn-lr-scale', '-1'], '--attn-lr-scale'), (['--device', 'xpu'], 'choose cpu'),
    (['--sync-bn', '--device', 'cpu'], 'GPUs only'), (['--clip-grad', '0'], 'more than 0'),
    (['--crop-pct', '0'], 'more than 0, and 1 at most'),
    (['--aa', 'nonsense'], '--aa'), (['--interpolation', 'nonsense'], '--interpolation'),
    (['--opt', 'adamx'], 'such as adamax'),
    (['--opt', 'adahessian'], '--opt adahessian'), (['--seed', '5000000000'], '4294967295 at most'),
    (['--model-kwargs', 'x'], 'NAME=VALUE'), (['--model-kwargs', 'nonsense=1'], 'nonsense'),
    (['--recompute-statistics', '--freeze', 'backbone'], '--freeze'),
])
def test_settings_that_make_no_sense(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], cure: str):
    assert run(tree, *FAST, '--epochs', '2', *options, '--output', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert cure in error
    assert error.count('\n') == 1
    assert cure in ('--lr', '--batch-size') or not (tmp_path / 'out').exists()  # what turns out in training has begun


@pytest.mark.skipif(int(PIL.__version__.partition('.')[0]) < 13, reason='this Pillow takes the policy')
def test_a_policy_that_pillow_refuses(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tree, *FAST, '--aa', 'v0', '--output', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert 'change --aa v0' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize('options', [[], ['--initial-checkpoint', 'absent']])
def test_a_misspelt_model(options: list[str], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tree, *FAST, *options, '--model', 'eca_resnet_50', '--output', tmp_path / 'out') == 2
    assert 'there is no model eca_resnet_50: did you mean eca_resnet50' in capsys.readouterr().err


def test_outputs_that_cant_be(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / 'file').write_text('')
    for output in (tree / 'out', tree, tmp_path / 'file', tmp_path / 'file' / 'out'):
        assert run(tree, *FAST, '--output', output) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert (tmp_path / 'file').read_text() == ''
    assert {path.name for path in tree.iterdir()} == set(COLOURS)


def _launch(*command: str, cwd: Path) -> str:
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path[1:2]])}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _in_two_processes(function: Callable[[], int], folder: Path) -> str:
    """Calls a function in two processes as torchrun starts them, and returns what they print."""
    port = str(20000 + os.getpid() % 20000)

    def run(rank: int) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the runs in this process
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port)
        return function()

    with (folder / 'printed.txt').open('a+') as printed:
        children = [fork(lambda rank=rank: run(rank), printed.fileno()) for rank in range(2)]
        statuses = [wait(child) for child in children]
        printed.seek(0)
        text = printed.read()
    assert statuses == [0, 0], text
    return text


@pytest.mark.slow
def test_each_optimizer_takes_steps():
    served = 0
    for opt in list_optimizers():
        try:
            Settings('digits', model='test_resnet', opt=opt).check()
        except FinetuneError:
            continue
        model = create_model('test_resnet', num_classes=2)
        optimizer = create_optimizer_v2(model, opt, lr=0.01, param_group_fn=partial(param_groups, lr=0.01))
        before = model.conv1[0].weight.clone()
        for _ in range(2):  # the first step of ADOPT only sets its state
            model(torch.randn(4, 3, 16, 16)).square().sum().backward()
            optimizer.step()
        assert not torch.equal(before, model.conv1[0].weight), opt
        served += 1
    assert served > 60


@pytest.mark.slow
def test_two_processes_reach_the_accuracy_of_one(tmp_path: Path):
    command = [
        'digits', '--model', 'eca_test_resnet', '--no-pretrained', '--img-size', '32', '--epochs', '4', '--lr', '0.01',
        '--workers', '0', '--output',
    ]
    assert run(*command, tmp_path / 'one', '--batch-size', '32') == 0
    printed = _in_two_processes(lambda: run(*command, tmp_path / 'two', '--batch-size', '16'), tmp_path)
    assert len(re.findall('1,437 images to train on, 360 to validate on', printed)) == 1
    assert len(re.findall('timm-eca evaluate digits --model', printed)) == 1
    one, two = (max(float(row['top1']) for row in rows(tmp_path / name)) for name in ('one', 'two'))
    assert min(one, two) > 95
    assert abs(one - two) < 3
    assert create_model(f'local-dir:{tmp_path / "two"}', pretrained=True).num_classes == 10


def test_errors_of_the_first_process_reach_the_others(tmp_path: Path):
    def fail() -> int:
        accelerator = Accelerator(cpu=True)
        for error in (KeyError('key'), MemoryError(), FinetuneError('a sentence'), OSError(28, 'full', 'file')):
            def function(error: Exception = error) -> None:
                raise error
            try:
                on_main(accelerator, function)
            except Exception as e:
                print(f'{accelerator.process_index} {type(e).__name__} {e}')
        print(accelerator.process_index, on_main(accelerator, lambda: 'result'))
        accelerator.end_training()
        return 0

    printed = _in_two_processes(fail, tmp_path)
    full = 'FinetuneError file can\'t be written (full): make room, or name another --output.'
    other = '1 FinetuneError The first process ended with an error: look at its output.'
    assert sorted(printed.splitlines()) == sorted([
        '0 KeyError \'key\'', other, '0 MemoryError ', other, '0 FinetuneError a sentence',
        '1 FinetuneError a sentence', f'0 {full}', f'1 {full}', '0 result', '1 result'])


def test_norms_over_all_processes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a single process, as a CPU has them, too, they compute what others do, also where they are frozen."""
    monkeypatch.setattr(
        'timm_eca.finetune.run._make_accelerator', lambda settings: _make_accelerator(replace(settings, sync_bn=False)))
    monkeypatch.setattr('timm_eca.layers.norm_attn.fused_norm_eca', Mock(return_value=None))  # it rounds otherwise
    convert = Mock(side_effect=convert_sync_batchnorm)
    monkeypatch.setattr('timm_eca.finetune.trainer.convert_sync_batchnorm', convert)
    command = [tree, *FAST, '--epochs', '1', '--freeze', 'bn1,blocks.0', '--output']
    assert run(*command, tmp_path / 'plain') == 0
    assert not convert.called
    assert run(*command, tmp_path / 'sync', '--sync-bn') == 0
    assert convert.called
    plain, sync = _weights(tmp_path / 'plain'), _weights(tmp_path / 'sync')
    assert all(torch.equal(plain[key], sync[key]) for key in plain)


def test_the_type_of_mixed_precision(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr('timm_eca.finetune.run.Accelerator', lambda **options: made.append(options['mixed_precision']))
    for available, device, amp_dtype, expected in (
            (False, None, None, 'bf16'), (True, 'cpu', None, 'bf16'), (True, None, None, 'fp16'),
            (True, None, 'bfloat16', 'bf16')):
        monkeypatch.setattr(torch.accelerator, 'is_available', lambda available=available: available)
        with suppress(AttributeError):
            _make_accelerator(Settings('digits', model=MODEL, device=device, amp=True, amp_dtype=amp_dtype))
        assert made.pop() == expected


@pytest.mark.slow
def test_accelerate_launch_in_mixed_precision(tree: Path, tmp_path: Path):
    printed = _launch(
        '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', '--num_machines', '1',
        '--mixed_precision', 'bf16', '--dynamo_backend', 'no',
        '-m', 'timm_eca', 'finetune', str(tree), *FAST, '--epochs', '1', '--output', 'out', cwd=tmp_path)
    assert 'use: timm.create_model' in printed
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    assert weights['conv_stem.weight'].dtype == torch.float32


def test_without_the_extra(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.delitem(sys.modules, 'timm_eca.finetune.run', raising=False)
    assert run(tree, *FAST) == 2
    assert 'pip install \'timm_eca[finetune]\'' in capsys.readouterr().err


def test_the_help_and_missing_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run('--help')
    printed = capsys.readouterr().out
    assert 'MISSING' not in printed
    assert '--attn-lr-scale' in printed
    for arguments, named in (([], 'DATA'), (['digits'], '--model'), (['digits', '--model', MODEL, '--epoch', '1'], ''),
            (['digits', '--model', MODEL, '--sched', 'plateau'], 'cosine'),
            (['digits', '--model', MODEL, '--class-weights', '1,2'], 'balanced')):
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count('\n') <= 2


def test_trackers_that_are_not_installed(
        tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('timm_eca.finetune.run.get_available_trackers', list)
    assert run(tree, *FAST, '--log-with', 'tensorboard') == 2
    assert 'pip install tensorboard' in capsys.readouterr().err
