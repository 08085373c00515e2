"""Files from others: one clear sentence on stderr, exit status 2, no traceback, nothing run, nothing written."""
import copy
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


def _overlapping(path: Path) -> None:
    """A list of contents that names the same bytes many times."""
    torch.save({'fc.weight': torch.zeros(2 ** 10)}, path)
    with zipfile.ZipFile(path, 'a') as archive:
        record = archive.getinfo(next(name for name in archive.namelist() if name.endswith('/data/0')))
        for index in range(1, 100):
            again = copy.copy(record)
            again.filename = f'{record.filename}{index}'
            archive.filelist.append(again)
        archive.writestr('end', '')


def _unpacked(path: Path) -> None:
    torch.save(official_state_dict(MODEL), path.with_suffix('.zip'))
    shutil.unpack_archive(path.with_suffix('.zip'), path)


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


def _put(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


def _share(state_dict: dict[str, torch.Tensor]) -> None:
    """All weights of a shape are one tensor."""
    first: dict[torch.Size, torch.Tensor] = {}
    state_dict.update({key: first.setdefault(value.shape, value) for key, value in state_dict.items()
                       if value.dtype == torch.float32})


def _official_width(state_dict: dict[str, torch.Tensor]) -> None:
    """The shapes of the official MobileNetV2 of width 0.5: its second stage has int(24 * 0.5) = 12 channels, not 16."""
    for key, value in state_dict.items():
        half = tuple(slice(0, size // 2 if size > 9 else size) for size in value.shape)
        state_dict[key] = value[half].clone()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    # Not a file of torch.save or safetensors, or not a whole one
    'text': (lambda path: path.write_text('epoch 100, top-1 77.42\n' * 40), 'not of torch.save or safetensors'),
    'html': (_html, 'web page'),
    'empty file': (lambda path: path.touch(), r'cut off or damaged.* 0 bytes'),
    'cut off': (_cut(lambda state_dict, path: save_official(path, state_dict)), 'cut off or damaged'),
    'zip cut off': (_cut(torch.save), 'cut off'),
    'safetensors cut off': (_cut(save_file), 'cut off or damaged'),
    'unpacked checkpoint': (_unpacked, 'is a directory: name the file itself'),
    'pipe': (lambda path: os.mkfifo(path), 'is not a file'),
    'missing': (lambda path: None, 'name an existing checkpoint file'),
    # Larger inside than outside
    'compressed zip': (_compressed, 'larger than the file'),
    'zip of overlapping records': (_overlapping, 'larger than the file'),
    'one tensor for many': (_official(_share), 'larger than the file'),
    'larger than its data': (
        _official(_set('classifier.1.weight', lambda w: torch.ones(1).expand(w.shape))), 'larger than the file'),
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
    'plain resnet18': (lambda path: torch.save(timm.create_model('resnet18').state_dict(), path), 'no ECA kernels'),
    'mixed kernel sizes': (
        _official(_set('layer2.1.eca.conv.weight', lambda w: torch.ones(1, 1, 3)), 'eca_resnet18'),
        'sizes 3, 5 in layer2'),
    'even kernel sizes': (_official(lambda state_dict: state_dict.update(
        {f'layer3.{i}.eca.conv.weight': torch.ones(1, 1, 4) for i in range(2)}), 'eca_resnet18'), 'sizes 4 in layer3'),
    'missing layer': (_official(lambda s: s.pop(CONV)), f'closest is {MODEL}, but {CONV} is missing'),
    'missing eca': (_official(lambda s: s.pop('layer3.1.eca.conv.weight'), 'eca_resnet18'),
                    r'eca_resnet18, but layer3\.1\.eca\.conv\.weight is missing: convert'),
    'extra tensor': (_official(lambda s: s.update(extra=torch.ones(1))), 'extra is not known'),
    'escapes in names': (_official(lambda s: s.update({'x\x1b[2J\nfake': torch.ones(1)})), r'x\\x1b\[2J\\nfake'),
    'wrong shape': (_official(_set(CONV, lambda w: w[:40].clone())), r'has shape \[40, 1, 3, 3\], not'),
    'wrong eca shape': (
        _official(_set('features.2.conv.4.conv.weight', lambda w: torch.ones(1, 2, 3))), r'\[1, 2, 3\], not \[1, 1'),
    'classifier of two minds': (
        _official(_set('classifier.1.bias', lambda b: b[:999].clone())), r'classifier\.1\.bias has shape'),
    'other width': (_official(_official_width, 'eca_mobilenetv2'), 'closest is eca_mobilenetv2_050, but features.2'),
    'stem without dimensions': (
        _official(lambda s: s.update({'features.0.0.weight': torch.tensor(1.)})), f'closest is {MODEL}'),
    'more stages': (_official(lambda s: s.update({'blocks.9.0.bn3.attn.conv.weight': torch.ones(1, 1, 3)})),
                    r'blocks\.9\.0.* is not known'),
    # Tensors that can't be weights
    'nan': (_official(_set(CONV, lambda w: _put(w, float('nan')))), 'NaN or Inf'),
    'inf': (_official(_set('features.0.1.running_var', lambda w: _put(w, float('inf')))), 'NaN or Inf'),
    'float64': (_official(_set(CONV, lambda w: w.double())), 'torch.float64'),
    'float8': (_saves({'fc.weight': torch.ones(2).to(torch.float8_e4m3fn)}), 'torch.float8_e4m3fn'),
    'int8': (_official(_set(CONV, lambda w: w.to(torch.int8))), 'torch.int8'),
    'sparse': (_official(_set(CONV, lambda w: w.to_sparse())), 'sparse'),
    'meta': (_official(_set(CONV, lambda w: w.to('meta'))), 'cut off or damaged|empty'),
    'not a tensor': (_official(_set(CONV, lambda w: 'weights')), 'a str and not a tensor'),
    'float count': (_official(_set('features.0.1.num_batches_tracked', lambda w: torch.tensor(2.5))), 'no count'),
    'long name': (_saves({f'{"x" * 5000}.num_batches_tracked': torch.ones(2)}), 'no count'),
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
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.count('\n') == 1
    assert 'web page' in done.stderr


def _expect_refusal(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count('\n') == 1


def test_output_exists(resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / 'output'
    output.mkdir()
    _expect_refusal(['convert', str(resnet18_file), '--output', str(output)], '--force', capsys)
    assert _tree(output) == []
    output.rmdir()
    output.write_text('a file')
    _expect_refusal(['convert', str(resnet18_file), '--output', str(output), '--force'], 'not a folder', capsys)
    assert output.read_text() == 'a file'


def test_output_below_a_file(resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / 'file').write_text('a file')
    output = str(tmp_path / 'file' / 'x')
    _expect_refusal(['convert', str(resnet18_file), '--output', output], 'can\'t be written', capsys)


@pytest.mark.parametrize('tag', ['../../etc', '', '.hidden', 'a b', 'a/b'])
def test_tag_can_not_leave_the_weights_directory(
        tag: str, resnet18_file: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    _expect_refusal(['convert', str(resnet18_file), '--tag', tag], 'can\'t be a tag', capsys)
    assert not home.exists()


@pytest.mark.parametrize('limit', [10_000, 10_000_000])
def test_full_disk(limit: int, resnet18_file: Path, tmp_path: Path):
    """A limit on the size of files stands for a disk that is full: writing fails half-way."""
    status, printed = run_command(
        ['convert', resnet18_file, '--output', tmp_path / 'new' / 'output'],
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 2, printed
    assert 'can\'t be written' in printed
    assert printed.count('\n') == 1
    assert _tree(tmp_path) == []


def test_read_only_folder(resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere, but for what the kernel keeps to itself
        folder = Path('/sys')
        if not folder.is_dir():
            pytest.skip('no folder here is read-only to this user')
    before = sorted(folder.iterdir())
    output = str(folder / 'output')
    _expect_refusal(['convert', str(resnet18_file), '--output', output], 'can\'t be written', capsys)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(('args', 'sentence'), [
    (['--output', ''], 'empty'),
    (['--mean', 'nan', '--tag', 'x'], 'Invalid --mean (nan,)'),
    (['--std', '0', '--tag', 'x'], 'give one positive number'),
    (['--std', '1', '2', '--tag', 'x'], 'one for each of the 3 input channels'),
    (['--tag', 'bangguwu_in1k', '--mean', '0.5'], 'with --tag NAME'),
    (['--official', '--mean', '0.5'], 'leave out --mean and --std'),
    (['--push-to-hub', 'a//b'], 'ORGANISATION/NAME'),
    (['--push-to-hub', 'name'], 'ORGANISATION/NAME'),
])
def test_wrong_options(
        args: list[str], sentence: str, resnet18_file: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    _expect_refusal(['convert', str(resnet18_file), *args], sentence, capsys)
    assert not home.exists()


@pytest.mark.parametrize('args', [
    ['convert'],
    ['convert', 'file', '--download', 'eca_resnet18'],
    ['convert', '--download', 'eca_resnet18', '--official'],
    ['convert', 'file', '--private'],
    ['convert', 'file', '--dry-run'],
    ['convert', 'file', 'file'],
    ['convert', '--all', '--output', 'folder'],
    ['convert', '--all', '--push-to-hub', 'organisation/name'],
])
def test_wrong_arguments(args: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert 'See timm-eca' in capsys.readouterr().err
