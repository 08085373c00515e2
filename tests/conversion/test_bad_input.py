"""Files from others: one clear sentence on stderr, exit status 2, no traceback, nothing run, nothing written."""
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.forked import run_command
from helpers.official_files import official_state_dict, save_official
from safetensors.torch import save_file
from timm.models import create_model, save_for_hf

from timm_eca.commands.main import main

ROOT = Path(__file__).parents[2]
CANARY = 'canary'
MODEL = 'eca_mobilenetv2_050'
CONV = 'features.2.conv.1.0.weight'


class RunsCode:
    """A hostile object in a pickle: loading it would make a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (CANARY,)


def _html(path: Path) -> None:
    path.write_text('\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>')


def _cut(save: Callable[[Any, Path], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save(official_state_dict(MODEL), path)
        path.write_bytes(path.read_bytes()[:100_000])
    return make


def _compressed(path: Path) -> None:
    """Zeros, which take a thousandth of their size."""
    torch.save({'fc.weight': torch.zeros(2 ** 20)}, path.with_suffix('.plain'))
    with zipfile.ZipFile(path.with_suffix('.plain')) as plain, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    path.with_suffix('.plain').unlink()


def _saves(content: Any, **kwargs: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **kwargs)


def _official(change: Callable[[dict[str, Any]], Any], model: str = MODEL) -> Callable[[Path], None]:
    """An official file after a change to its state dict."""
    def make(path: Path) -> None:
        state_dict = official_state_dict(model)
        change(state_dict)
        save_official(path, state_dict)
    return make


def _set(key: str, value: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict.update({key: value(state_dict[key])})


def _put_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float('nan')
    return tensor


def _share(state_dict: dict[str, torch.Tensor]) -> None:
    """All weights of a shape are one tensor."""
    first: dict[torch.Size, torch.Tensor] = {}
    state_dict.update({key: first.setdefault(value.shape, value) for key, value in state_dict.items()
                       if value.dtype == torch.float32})


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    # Not a file of torch.save or safetensors, or not a whole one
    'text': (lambda path: path.write_text('epoch 100, top-1 77.42\n' * 40), 'not of torch.save or safetensors'),
    'html': (_html, 'web page'),
    'empty file': (lambda path: path.touch(), 'cut off or damaged'),
    'cut off': (_cut(lambda state_dict, path: save_official(path, state_dict)), 'cut off or damaged'),
    'zip cut off': (_cut(torch.save), 'cut off'),
    'safetensors cut off': (_cut(save_file), 'cut off or damaged'),
    'unpacked checkpoint': (lambda path: path.mkdir(), 'is not a file: name the file itself'),
    'pipe': (lambda path: os.mkfifo(path), 'is not a file'),
    'missing': (lambda path: None, 'name an existing checkpoint file'),
    # Larger inside than outside
    'compressed zip': (_compressed, 'larger than the file'),
    'one tensor for many': (_official(_share), 'needs more bytes than the file has'),
    'larger than its data': (
        _official(_set('classifier.1.weight', lambda w: torch.ones(1).expand(w.shape))), 'more bytes than the file'),
    # More than tensors, or none
    'plain pickle that runs code': (
        lambda path: path.write_bytes(pickle.dumps(RunsCode())), 'not of torch.save or safetensors'),
    'zip that runs code': (_saves({'state_dict': RunsCode()}), 'could run code.* save only the state_dict'),
    'legacy that runs code': (
        _saves({'state_dict': RunsCode()}, _use_new_zipfile_serialization=False), 'could run code'),
    'whole model': (_saves(torch.nn.Linear(2, 2)), 'could run code'),
    'list': (_saves([torch.ones(2)]), 'not a state dict'),
    'key is not a string': (_saves({'state_dict': {'fc.weight': torch.ones(1), 7: torch.ones(1)}}), 'not a state dict'),
    'empty dict': (_saves({}), 'empty state dict'),
    'empty state dict': (_saves({'state_dict': {}, 'epoch': 3}), 'empty state dict'),
    # Another network
    'plain resnet': (lambda path: torch.save(timm.create_model('test_resnet').state_dict(), path), 'no ECA kernels'),
    'mixed kernel sizes': (
        _official(_set('features.3.conv.4.conv.weight', lambda w: torch.ones(1, 1, 5))), 'sizes 3, 5 in blocks.1'),
    'even kernel sizes': (
        _official(_set('features.1.conv.3.conv.weight', lambda w: torch.ones(1, 1, 4))), 'sizes 4 in blocks.0'),
    'another ECA network': (
        lambda path: torch.save(create_model('eca_test_resnet').state_dict(), path), "authors' code: convert"),
    'missing layer': (_official(lambda s: s.pop(CONV)), f'closest is {MODEL}, but {CONV} is missing: convert'),
    'missing eca': (_official(lambda s: s.pop('features.3.conv.4.conv.weight')),
                    r'but features\.3\.conv\.4\.conv\.weight is missing: convert'),
    'extra tensor': (_official(lambda s: s.update(extra=torch.ones(1))), 'extra is not known'),
    'escapes in names': (_official(lambda s: s.update({'x\x1b[2J\nfake': torch.ones(1)})), r'x\\x1b\[2J\\nfake'),
    'wrong shape': (_official(_set(CONV, lambda w: w[:40].clone())), r'has shape \[40, 1, 3, 3\], not'),
    'wrong eca shape': (
        _official(_set('features.2.conv.4.conv.weight', lambda w: torch.ones(1, 2, 3))), r'\[1, 2, 3\], not \[1, 1'),
    'stem without dimensions': (
        _official(lambda s: s.update({'features.0.0.weight': torch.tensor(1.)})), f'closest is {MODEL}'),
    'more stages': (_official(lambda s: s.update({'blocks.9.0.bn3.attn.conv.weight': torch.ones(1, 1, 3)})),
                    r'blocks\.9\.0.* is not known'),
    # Tensors that can't be weights
    'nan': (_official(_set(CONV, _put_nan)), 'NaN or Inf'),
    'float64': (_official(_set(CONV, lambda w: w.double())), 'torch.float64'),
    'float8': (_saves({'fc.weight': torch.ones(2).to(torch.float8_e4m3fn)}), 'torch.float8_e4m3fn'),
    'sparse': (_saves({'fc.weight': torch.eye(2).to_sparse()}), 'sparse'),
    'meta': (_saves({'fc.weight': torch.ones(2, device='meta')}), 'cut off or damaged|empty'),
    'not a tensor': (_official(_set(CONV, lambda w: 'weights')), 'a str and not a tensor'),
    'float count': (_saves({f'{"x" * 5000}.num_batches_tracked': torch.ones(2)}), 'no count'),
}


def _tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob('*'))


@pytest.mark.parametrize('name', BAD)
def test_bad_file(
        name: str,
        tmp_path: Path,
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    make, sentence = BAD[name]
    path = tmp_path / 'bad.pth.tar'
    make(path)
    monkeypatch.chdir(tmp_path)
    before = _tree(tmp_path)
    assert main(['convert', str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert 'bad.pth.tar' in output.err
    assert output.err.count('\n') == 1
    assert len(output.err) < 800
    assert re.search(sentence, output.err), output.err
    assert _tree(tmp_path) == before  # no output, no temporary file, no canary
    assert not home.exists()


@pytest.mark.slow
def test_command_has_no_traceback(tmp_path: Path):
    """The script itself, as a user runs it."""
    path = tmp_path / 'page.pth.tar'
    _html(path)
    done = subprocess.run(
        [sys.executable, ROOT / 'convert_weights.py', path], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert 'web page' in done.stderr


def _expect_refusal(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count('\n') == 1


def test_weights_of_a_model_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """They are in our form already. The same file elsewhere is a checkpoint."""
    folder, other = tmp_path / 'folder', str(tmp_path / 'other')
    save_for_hf(create_model(MODEL, num_classes=3), folder, safe_serialization=True)
    assert main(['convert', str(folder / 'model.safetensors'), '--output', other]) == 2
    error = capsys.readouterr().err
    for words in ('is in a model folder already', f'--model {folder}', f'timm-eca export {folder}', 'timm-eca push'):
        assert words in error
    shutil.copy(folder / 'model.safetensors', tmp_path)
    assert main(['convert', str(tmp_path / 'model.safetensors'), '--output', other]) == 0
    shutil.copy(checkpoint, folder / 'model.safetensors')  # not what its name says
    assert main(['convert', str(folder / 'model.safetensors'), '--output', other, '--force']) == 0


def test_output_that_cant_be_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / 'file').write_text('a file')
    (tmp_path / 'folder').mkdir()
    for name, options, sentence in (
            ('folder', [], '--force'), ('file', ['--force'], 'a link or a file, not a folder'),
            ('file/x', [], 'can\'t be written')):
        _expect_refusal(['convert', str(checkpoint), '--output', str(tmp_path / name), *options], sentence, capsys)
    assert _tree(tmp_path) == [tmp_path / 'file', checkpoint, tmp_path / 'folder']


def test_full_disk(checkpoint: Path, tmp_path: Path):
    """A limit on the size of files stands for a disk that is full: writing fails half-way."""
    status, printed = run_command(
        ['convert', checkpoint, '--output', tmp_path / 'new' / 'output'],
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6)))
    assert status == 2, printed
    assert 'can\'t be written' in printed
    assert printed.count('\n') == 1
    assert _tree(tmp_path) == [checkpoint]


@pytest.mark.parametrize(('args', 'sentence'), [
    (['--tag', '../../etc'], 'can\'t be a tag'),
    (['--tag', '.hidden'], 'can\'t be a tag'),
    (['--tag', ''], 'can\'t be a tag'),
    (['--mean', 'nan', '--tag', 'x'], 'Invalid --mean (nan,)'),
    (['--std', '1', '2', '--tag', 'x'], 'one for each of the 3 input channels'),
    (['--push-to-hub', 'a//b'], 'ORGANISATION/NAME'),
    (['--push-to-hub', 'name'], 'ORGANISATION/NAME'),
])
def test_wrong_options(
        args: list[str], sentence: str, checkpoint: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    _expect_refusal(['convert', str(checkpoint), *args], sentence, capsys)
    assert not home.exists()


@pytest.mark.parametrize('args', [
    '', 'file --download eca_resnet18', '--download eca_resnet18 --official', 'file --private', 'file --dry-run',
    'file file', '--all --output folder', '--all --push-to-hub organisation/name',
])
def test_wrong_arguments(args: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(['convert', *args.split()])
    assert stopped.value.code == 2
    assert 'See timm-eca' in capsys.readouterr().err


def test_one_tensor_by_two_names(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    state_dict = official_state_dict('eca_resnet18')
    state_dict['layer1.0.bn1.norm.weight'] = state_dict['layer1.0.bn1.weight'].clone()
    torch.save(state_dict, tmp_path / 'file.pth')
    _expect_refusal(['convert', str(tmp_path / 'file.pth'), '--tag', 'x'], 'layer1.0.bn1.norm.weight', capsys)
    assert not [path for path in home.rglob('*') if path.is_file()]
