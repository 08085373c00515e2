"""`timm-eca finetune`, on folders of images that these tests draw, and on scikit-learn's digits."""
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
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
from helpers.image_folders import COLOURS, FAST, draw
from huggingface_hub import ModelCard
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.models import create_model, save_for_hf
from timm.optim import create_optimizer_v2, list_optimizers

from timm_eca import param_groups
from timm_eca.commands.main import main

pytest.importorskip('accelerate')
pytest.importorskip('sklearn')

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from timm_eca.finetune.run import _make_accelerator
from timm_eca.finetune.settings import FinetuneError, Settings
from timm_eca.finetune.trainer import on_main

FILES = {'README.md', 'config.json', 'model.safetensors', 'metrics.csv', 'curves.png', 'confusion_matrix.png'}
STATE = 'checkpoints/timm_eca.pt'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return draw(tmp_path / 'fruit', {'red': 10, 'green': 15, 'yellow': 10})


def run(*args: str | Path) -> int:
    return main(['finetune', *map(str, args)])


def rows(output: Path) -> list[dict[str, str]]:
    with (output / 'metrics.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / 'model.safetensors')


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


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


def test_from_a_folder_of_images_to_the_hub(
        tree: Path,
        tmp_path: Path,
        hub: HubDouble,
        figures: None,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tree / 'green').rename(tree / 'US$10_$ |<b>')
    output = tmp_path / 'out'
    assert run(tree, *FAST, '--epochs', '3', '--output', output, '--push-to-hub', 'timm-eca/fruit') == 0
    printed = capsys.readouterr().out
    assert '28 images to train on, 7 to validate on, 3 classes' in printed
    assert {path.name for path in output.iterdir()} == FILES | {'checkpoints'}
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir() if path.is_file()} == {0o666 & ~umask}

    table = rows(output)
    assert [row['epoch'] for row in table] == ['1', '2', '3']
    assert 'top5' not in table[0]  # of three classes
    config = json.loads((output / 'config.json').read_text())
    assert config['label_names'] == ['red', 'US$10_$ |<b>', 'yellow']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert 'num_classes' not in config['model_args']
    assert create_model(f'local-dir:{output}', pretrained=True).num_classes == 3
    card = ModelCard.load(output / 'README.md')
    best = max(float(row['top1']) for row in table)
    assert card.data.eval_results[0].metric_value == pytest.approx(best, abs=0.01)
    assert 'From random weights' in card.content
    assert 'in 3 epochs' in card.content
    assert 'US$10_$ \\|&lt;b>' in card.content
    for text in (printed, card.content):
        assert re.search(r'Channel weights over 7 validation images: 0\.\d+ to 0\.\d+, standard deviation', text)
    for name in ('curves.png', 'confusion_matrix.png'):
        with Image.open(output / name) as image:
            assert image.size > (400, 400)
            assert len(set(image.convert('L').resize((50, 50)).tobytes())) > 10
    assert set(hub.repos['timm-eca/fruit'].head().files) - {'.gitattributes'} == FILES
    assert hub.token not in printed

    # What to do next, with paths from the working directory.
    lines = printed.splitlines()
    following = lines[lines.index('Next:') + 1:]
    assert str(tmp_path) not in ''.join(following[:4])
    commands = [shlex.split(line)[1:] for line in following if line.startswith('  timm-eca ')]
    assert [command[0] for command in commands] == ['predict', 'evaluate', 'gates']
    for command in commands:
        assert main(command) == 0
    assert '35 images: top-1' in capsys.readouterr().out
    assert (output / 'gates' / 'gates.png').exists()
    assert (output / 'report' / 'confusion_matrix.png').exists()


def test_transformers_load_the_folder(tree: Path, tmp_path: Path):
    transformers = pytest.importorskip('transformers')
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
    ours = create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
    theirs = model.timm_model.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    assert model.config.id2label[1] == 'red'


def test_another_attention(tree: Path, tmp_path: Path):
    """The folder has the attention and the kernel sizes of the folder that it started from, or of the options."""
    save_for_hf(create_model('eca_test_resnet', attn_layer='se'), tmp_path / 'se')
    common = [tree, *FAST, '--epochs', '1', '--output']
    assert run(*common, tmp_path / 'a', '--model', tmp_path / 'se') == 0
    assert run(*common, tmp_path / 'b', '--model-kwargs', 'kernel_sizes=5', 'attn_layer=eca_ns') == 0
    for name, args in (('a', {'attn_layer': 'se'}), ('b', {'kernel_sizes': 5, 'attn_layer': 'eca_ns'})):
        found = json.loads((tmp_path / name / 'config.json').read_text())['model_args']
        assert found | args == found
    assert '--model-kwargs kernel_sizes=5 attn_layer=eca_ns' in (tmp_path / 'b' / 'README.md').read_text()


def test_splits_by_other_names(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The accuracy is that of the folder."""
    shutil.copytree(tree, tmp_path / 'data' / 'Training')
    draw(tmp_path / 'data' / 'Testing', {'red': 3, 'green': 3, 'yellow': 1})
    options = ['--epochs', '2', '--crop-pct', '1', '--val-split', 'test', '--output', tmp_path / 'out']
    assert run(tmp_path / 'data', *FAST, *options) == 0
    assert '35 images to train on, 7 to validate on, 3 classes' in capsys.readouterr().out
    model = ['--model', str(tmp_path / 'out'), '--split', 'test', '--json']
    assert main(['evaluate', str(tmp_path / 'data'), *model]) == 0
    best = max(float(row['top1']) for row in rows(tmp_path / 'out'))
    assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(best, rel=1e-4)
    assert run(tmp_path / 'data', *FAST, '--val-split', 'tset', '--output', tmp_path / '2') == 2


@pytest.mark.parametrize(('text', 'saved'), [('epoch  learning rate', 0), ('    1  ', 1)])
def test_ctrl_c(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, saved: int):
    """The same command continues the run, and so does the command that the state file has."""
    output = tmp_path / 'a folder'
    command = [tree, *FAST[:-2], '--epochs', '2', '--hflip', '0.25', '--output', output]  # without --workers
    with redirect_stdout(Stopper(text, KeyboardInterrupt)) as printed:
        assert run(*command) == 130
    assert f'Stopped after epoch {saved}. The same command continues the run.' in printed.getvalue()
    assert not (output / 'config.json').exists()
    if saved:
        words = shlex.split(torch.load(output / STATE)['command'])
        assert words[:3] == ['timm-eca', 'finetune', str(tree)]
        assert '--workers' not in words
        assert main(words[1:]) == 0
    else:
        assert run(*command) == 0
    assert ('Continuing after epoch 1' in capsys.readouterr().out) == bool(saved)
    assert len(rows(output)) == 2


@pytest.mark.parametrize('options', [
    [],
    ['--model-ema', '--mixup', '0.2', '--cutmix', '1.0', '--drop', '0.2', '--aa', 'rand-m5-n1', '--reprob', '0.5',
     '--grad-accum-steps', '2', '--opt', 'sgd', '--sched', 'step', '--workers', '1'],
], ids=['plain', 'everything random'])
def test_resuming_gives_the_same_bits(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]):
    command = [tree, *FAST, '--epochs', '2', *options, '--output']
    assert run(*command, tmp_path / 'whole') == 0
    parts = tmp_path / 'parts'
    with redirect_stdout(Stopper('    1  ', Killed)), pytest.raises(Killed):
        run(*command, parts)
    assert not (parts / 'config.json').exists()
    capsys.readouterr()
    assert run(*command, parts, '--extend') == 0
    assert 'Continuing after epoch 1,' in capsys.readouterr().out
    assert [{k: v for k, v in row.items() if k != 'seconds'} for row in rows(tmp_path / 'whole')] == [
        {k: v for k, v in row.items() if k != 'seconds'} for row in rows(parts)]
    expected, found = weights_of(tmp_path / 'whole'), weights_of(parts)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert {path.name for path in parts.iterdir()} == FILES | {'checkpoints'}
    assert {path.name for path in (parts / 'checkpoints').iterdir()} <= {'timm_eca.pt', '.timm_eca-lock'}

    assert 'No single command' not in (parts / 'README.md').read_text()

    # Again: nothing is left to do, with --extend, and nothing is lost without.
    before = (parts / 'model.safetensors').read_bytes()
    assert run(*command, parts, '--extend') == 0
    assert 'is finished, after 2 epochs' in capsys.readouterr().out
    assert (parts / 'model.safetensors').read_bytes() == before
    assert run(*command, parts) == 2
    assert '--force' in capsys.readouterr().err


def test_folders_with_other_things(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / 'out'
    assert run(tree, *FAST, '--epochs', '1', '--output', output) == 0
    (output / 'config.json').unlink()  # as if killed before the last file was there
    for other in (['--lr', '0.5'], ['--hflip', '0.1', '--model-ema']):
        assert run(tree, *FAST, '--epochs', '1', '--output', output, *other) == 2
        error = capsys.readouterr().err
        assert f'other settings or images (timm-eca finetune {tree} ' in error
        assert error.count('\n') == 1
    assert run(tree, *FAST, '--epochs', '1', '--output', output) == 0  # the same command goes on
    (tree / 'green').rename(tree / 'zebra')
    assert run(tree, *FAST, '--epochs', '2', '--output', output, '--extend') == 2
    (tree / 'zebra').rename(tree / 'green')
    capsys.readouterr()
    assert run(tree, *FAST, '--epochs', '2', '--output', output, '--extend') == 0
    assert 'The schedule is now that of 2 epochs instead of 1' in capsys.readouterr().out
    assert 'in turn 1, 2.\n' in (output / 'README.md').read_text()
    assert [float(row['lr']) > 0 for row in rows(output)] == [True, True]
    for name in ('notes.txt', 'checkpoints/mine.pt'):
        (output / name).write_text('')
    assert run(tree, *FAST, '--epochs', '1', '--output', output, '--lr', '0.5', '--force') == 0
    assert (output / 'notes.txt').exists()
    assert (output / 'checkpoints' / 'mine.pt').exists()
    for name in ('mine/thesis.txt', 'theirs/checkpoints/best.pth'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('')
        for force in ([], ['--force']):
            assert run(tree, *FAST, '--output', tmp_path / name.partition('/')[0], *force) == 2
            assert (tmp_path / name).exists()


def test_two_runs_in_one_folder(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / 'out' / 'checkpoints').mkdir(parents=True)
    with WeakFileLock(tmp_path / 'out' / 'checkpoints' / '.timm_eca-lock'):
        assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 2
    error = f'timm-eca: Another run is writing to {tmp_path / "out"}: wait for it, or name another --output.\n'
    assert capsys.readouterr().err == error


def test_outputs_that_cant_be(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / 'file').write_text('')
    for output in (tree / 'out', tree, tmp_path / 'file', tmp_path / 'file' / 'out'):
        assert run(tree, *FAST, '--output', output) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert (tmp_path / 'file').read_text() == ''
    assert {path.name for path in tree.iterdir()} == set(COLOURS)


def test_damaged_states_and_states_with_code(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / 'ran',)

    command = [tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out']
    assert run(*command) == 0
    path = tmp_path / 'out' / STATE
    whole = path.read_bytes()
    state = torch.load(path)
    tensors = {key: value[:1] for key, value in state['parts']['network'].items() if value.dim()}
    for content in (
            b'rubbish', whole[:-1000], {'settings': [1]}, {**state, 'rows': 5}, {**state, 'parts': {}},
            {**state, 'parts': {**state['parts'], 'network': tensors}},
            {**state, 'parts': {**state['parts'], 'ema': Hostile()}}):
        torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
        capsys.readouterr()
        assert run(*command[:-3], '2', *command[-2:], '--extend') == 2
        error = capsys.readouterr().err
        assert f'{path} is damaged' in error
        assert '--force' in error
    assert not (tmp_path / 'ran').exists()


def test_what_is_told_without_a_terminal(
        tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter(range(0, 10 ** 6, 40))  # seconds
    monkeypatch.setattr('timm_eca.finetune.trainer.time.monotonic', lambda: next(clock))
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 0
    assert re.search(r'epoch 1: \d of 3 batches, loss \d\.\d{4}', capsys.readouterr().out)


def test_the_learning_rate_of_an_epoch(tree: Path, tmp_path: Path):
    common = [tree, *FAST, '--warmup-epochs', '0', '--lr', '0.01', '--attn-lr-scale', '30', '--output']
    assert run(*common, tmp_path / 'cosine', '--epochs', '2') == 0
    rates = [0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]  # before each of six steps
    assert [float(row['lr']) for row in rows(tmp_path / 'cosine')] == [
        pytest.approx(sum(part) / 3, rel=1e-4) for part in (rates[:3], rates[3:])]
    assert run(*common, tmp_path / 'step', '--epochs', '3', '--sched', 'step') == 0
    assert [float(row['lr']) for row in rows(tmp_path / 'step')] == pytest.approx([1e-2, 1e-3, 1e-4], rel=1e-4)


@pytest.mark.slow
def test_the_parts_of_a_recipe(tree: Path, tmp_path: Path):
    def train(name: str, *options: str) -> dict[str, torch.Tensor]:
        assert run(tree, *FAST, '--epochs', '1', '--seed', '3', *options, '--output', tmp_path / name) == 0
        return weights_of(tmp_path / name)

    plain, same = train('plain'), train('same')
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    for name, options in {
        'seed': ['--seed', '4'], 'smoothing': ['--smoothing', '0'], 'layers': ['--layer-decay', '0.7'],
        'weights': ['--class-weights', 'balanced'],
        'clip': ['--clip-grad', '0.1'], 'accumulation': ['--grad-accum-steps', '2'],
        'ema': ['--model-ema', '--model-ema-decay', '0.5'], 'schedule': ['--sched', 'constant'],
        'optimizer': ['--opt', 'lamb'], 'flip': ['--vflip', '1'], 'mixup': ['--mixup', '0.8'],
        'attention': ['--attn-lr-scale', '10'],
    }.items():
        assert not torch.equal(plain['fc.weight'], train(name, *options)['fc.weight']), name

    start = ['--initial-checkpoint', str(tmp_path / 'plain')]
    frozen = train('frozen', *start, '--freeze', 'backbone', '--lr', '0.01')
    for key in plain:
        assert torch.equal(plain[key], frozen[key]) == (not key.startswith('fc.')), key
    part = train('part', *start, '--freeze', 'conv1,bn1,layer1')
    assert torch.equal(plain['layer1.0.bn1.running_mean'], part['layer1.0.bn1.running_mean'])
    assert not torch.equal(plain['layer2.0.bn1.running_mean'], part['layer2.0.bn1.running_mean'])


def test_statistics_are_recomputed(tree: Path, tmp_path: Path):
    """In one pass over the three batches: the weights stay, the norms count from 0, also those before ECA."""
    command = [tree, *FAST, '--epochs', '2', '--output']
    assert run(*command, tmp_path / 'plain') == 0
    assert run(*command, tmp_path / 'again', '--recompute-statistics') == 0
    plain, again = weights_of(tmp_path / 'plain'), weights_of(tmp_path / 'again')
    for key, value in again.items():
        if key.endswith('num_batches_tracked'):
            assert value == 3, key
        else:
            assert torch.equal(value, plain[key]) != ('running' in key), key
    assert 'layer1.0.bn2.norm.running_mean' in again
    assert '--recompute-statistics' in (tmp_path / 'again' / 'README.md').read_text()


def test_early_stopping(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    still = ['--freeze', 'backbone', '--lr', '0', '--epochs', '9', '--patience', '2']
    assert run(tree, *FAST, *still, '--output', tmp_path / 'out') == 0
    assert 'Stopped early: no better accuracy in 2 epochs' in capsys.readouterr().out
    assert len(rows(tmp_path / 'out')) == 3


def test_norms_over_all_processes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a single process they compute what others do. They need a GPU, so `--sync-bn` is told here that it has one."""
    monkeypatch.setattr('timm_eca.layers.norm_attn.fused_norm_eca', lambda *args: None)  # it rounds in another way
    command = [tree, *FAST, '--epochs', '1', '--output']
    assert run(*command, tmp_path / 'plain') == 0
    assert run(*command, tmp_path / 'sync', '--sync-bn') == 2
    monkeypatch.setattr(
        'timm_eca.finetune.run._make_accelerator', lambda settings: _make_accelerator(replace(settings, sync_bn=False)))
    convert = Mock(side_effect=convert_sync_batchnorm)
    monkeypatch.setattr('timm_eca.finetune.trainer.convert_sync_batchnorm', convert)
    assert run(*command, tmp_path / 'sync', '--sync-bn') == 0
    assert convert.called
    plain, sync = weights_of(tmp_path / 'plain'), weights_of(tmp_path / 'sync')
    assert all(torch.equal(plain[key], sync[key]) for key in plain)


def test_fewer_images_than_processes(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Accelerator, 'num_processes', property(lambda self: 99))
    assert run(tree, *FAST, '--epochs', '1', '--output', tmp_path / 'out') == 2
    assert '28 images to train on are too few: add images' in capsys.readouterr().err


def test_trackers(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('timm_eca.finetune.run.get_available_trackers', list)
    assert run(tree, *FAST, '--log-with', 'tensorboard') == 2
    assert 'pip install tensorboard' in capsys.readouterr().err


def test_grey_images(tree: Path, tmp_path: Path):
    assert run(tree, *FAST, '--epochs', '1', '--in-chans', '1', '--output', tmp_path / 'out') == 0
    model = create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert list(model.pretrained_cfg['mean']) == [0.5]


def test_a_single_step_trains(tree: Path, tmp_path: Path):
    command = [tree, *FAST, '--epochs', '1', '--batch-size', '64', '--output']
    assert run(*command, tmp_path / 'still', '--lr', '0') == 0
    assert run(*command, tmp_path / 'trained') == 0
    still, trained = weights_of(tmp_path / 'still'), weights_of(tmp_path / 'trained')
    assert not torch.equal(still['conv1.0.weight'], trained['conv1.0.weight'])


def test_accumulation_of_a_last_step_with_fewer_batches(tree: Path, tmp_path: Path):
    command = [tree, *FAST, '--epochs', '1', '--opt', 'sgd', '--sched', 'none', '--lr', '0.1', '--output']
    for steps in ('3', '16'):  # of the three batches that there are
        assert run(*command, tmp_path / steps, '--grad-accum-steps', steps) == 0
    three, sixteen = weights_of(tmp_path / '3'), weights_of(tmp_path / '16')
    for key, value in three.items():
        torch.testing.assert_close(value, sixteen[key], rtol=1e-4, atol=1e-6)


def test_frozen_backbones_of_other_kinds(tree: Path, tmp_path: Path):
    data = [tree, '--model', 'test_vit', *FAST[2:3], *FAST[5:], '--epochs', '1', '--freeze', 'backbone', '--output']
    assert run(*data, tmp_path / 'vit', '--lr', '0.1') == 0
    assert run(*data, tmp_path / 'still', '--lr', '0') == 0
    trained, still = weights_of(tmp_path / 'vit'), weights_of(tmp_path / 'still')
    assert {key for key in still if not torch.equal(still[key], trained[key])} == {'head.weight', 'head.bias'}


@pytest.mark.parametrize(('options', 'words'), [
    (['--epochs', '0'], '--epochs 0'), (['--lr', 'nan'], '--lr nan'), (['--val-fraction', '1'], '--val-fraction'),
    (['--smoothing', '2'], 'give 0 to 1'), (['--mixup', '1', '--batch-size', '7'], 'even'),
    (['--freeze', 'head'], 'conv1'), (['--in-chans', '2'], '1 or 3'), (['--mean', '0.5', '0.5'], '--mean'),
    (['--lr', '1e30', '--opt', 'sgd', '--warmup-epochs', '0'], 'lower --lr'), (['--std', '0'], '--std'),
    (['--amp', '--amp-dtype', 'float16', '--device', 'cpu'], 'bfloat16'), (['--device', 'xpu'], 'choose cpu'),
    (['--batch-size', '1'], '--batch-size'), (['--aa', 'nonsense'], '--aa nonsense'), (['--opt', 'adamx'], 'adamax'),
    (['--opt', 'adahessian'], '--opt adahessian is not possible (it needs second derivatives)'),
    (['--seed', '5000000000'], '4294967295'), (['--model-kwargs', 'x'], 'NAME=VALUE'),
    (['--model-kwargs', 'nonsense=1'], 'nonsense'),
    (['--recompute-statistics', '--freeze', 'backbone'], '--freeze'),
])
def test_settings_that_make_no_sense(
        tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str):
    assert run(tree, *FAST, '--epochs', '2', *options, '--output', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count('\n') == 1
    assert {path.name for path in tmp_path.glob('out/*')} <= {'checkpoints'}  # some turn out in training


@pytest.mark.skipif(int(PIL.__version__.partition('.')[0]) < 13, reason='this Pillow takes the policy')
def test_a_policy_that_pillow_refuses(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tree, *FAST, '--aa', 'v0', '--output', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert '--aa v0 is not possible with this timm and Pillow (bits must be' in error
    assert re.findall(r'--[\w-]+', error) == ['--aa']
    assert error.count('\n') == 1


def _in_processes(function: Callable[[], int], folder: Path, count: int = 2) -> str:
    """Calls a function in processes as torchrun starts them, and returns what they print."""
    port = str(20000 + os.getpid() % 20000)

    def run(rank: int) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the runs in this process
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        return function()

    with (folder / 'printed.txt').open('a+') as printed:
        children = [fork(lambda rank=rank: run(rank), printed.fileno()) for rank in range(count)]
        statuses = [wait(child) for child in children]
        printed.seek(0)
        text = printed.read()
    assert statuses == [0] * count, text
    return text


@pytest.mark.slow
def test_two_processes_reach_the_accuracy_of_one(tmp_path: Path):
    command = ['digits', *FAST[:3], '--epochs', '2', '--lr', '0.01', '--workers', '0', '--output']
    assert run(*command, tmp_path / 'one', '--batch-size', '32') == 0
    printed = _in_processes(lambda: run(*command, tmp_path / 'two', '--batch-size', '16'), tmp_path)
    assert printed.count('1,437 images to train on, 360 to validate on') == 1
    assert printed.count('timm-eca evaluate digits --model') == 1
    one, two = (max(float(row['top1']) for row in rows(tmp_path / name)) for name in ('one', 'two'))
    assert min(one, two) > 90
    assert abs(one - two) < 3
    assert '% on 360 validation images' in (tmp_path / 'two' / 'README.md').read_text()


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

    printed = _in_processes(fail, tmp_path)
    full = 'FinetuneError file can\'t be written (full): make room, or name another --output.'
    other = '1 FinetuneError The first process ended with an error: look at its output.'
    assert sorted(printed.splitlines()) == sorted([
        '0 KeyError \'key\'', other, '0 MemoryError ', other, '0 FinetuneError a sentence',
        '1 FinetuneError a sentence', f'0 {full}', f'1 {full}', '0 result', '1 result'])


@pytest.mark.slow
def test_mixed_precision(tree: Path, tmp_path: Path):
    command = [tree, *FAST, '--amp', '--epochs', '1', '--output', tmp_path / 'out']
    printed = _in_processes(lambda: run(*command), tmp_path, 1)
    assert 'top-1' in printed
    assert weights_of(tmp_path / 'out')['conv1.0.weight'].dtype == torch.float32


def test_the_type_of_mixed_precision(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr('timm_eca.finetune.run.Accelerator', lambda **options: made.append(options['mixed_precision']))
    for available, device, amp_dtype, expected in (
            (False, None, None, 'bf16'), (True, 'cpu', None, 'bf16'), (True, None, None, 'fp16'),
            (True, None, 'bfloat16', 'bf16')):
        monkeypatch.setattr(torch.accelerator, 'is_available', lambda available=available: available)
        with suppress(AttributeError):
            _make_accelerator(Settings('digits', model='x', device=device, amp=True, amp_dtype=amp_dtype))
        assert made.pop() == expected


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


def test_without_the_extra(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.delitem(sys.modules, 'timm_eca.finetune.run', raising=False)
    assert run(tree, *FAST) == 2
    assert 'pip install \'timm_eca[finetune]\'' in capsys.readouterr().err


def test_the_help_and_missing_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run('--help')
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'MISSING' not in printed
    assert '--scale MIN MAX smallest and largest part of the image to crop (default: 0.35 1.0)' in printed
    assert 'highest learning rate (default: 0.001; 0.002 with --no-pretrained) --' in printed
    for arguments, named in (
            ([], 'DATA'), (['digits'], '--model'), (['digits', '--model', 'x', '--epoch', '1'], '--epoch'),
            (['digits', '--model', 'x', '--interpolation', 'nonsense'], 'bicubic')):
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        assert exit.value.code == 2
        assert named in capsys.readouterr().err
