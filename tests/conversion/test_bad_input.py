"""Files from others: one clear sentence on stderr, exit status 2, no traceback, nothing run, nothing written."""
import copy
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
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


class RunsCode:
    """What a hostile pickle holds: loading it would make a file."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (CANARY,)


def _text(path: Path) -> None:
    path.write_text('epoch 100, top-1 77.42\n' * 40)


def _html(path: Path) -> None:
    path.write_text('\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>')


def _cut(size: int, zipped: bool = False) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        source = official_state_dict('eca_resnet18')
        torch.save(source, path) if zipped else save_official(path, source)
        path.write_bytes(path.read_bytes()[:size])
    return make


def _tar(path: Path) -> None:
    with tarfile.open(path, 'w') as archive:
        archive.add(__file__)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('weights/readme.txt', 'none here')


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


def _safetensors_cut(path: Path) -> None:
    save_file(official_state_dict('eca_mobilenetv2_050'), path)
    path.write_bytes(path.read_bytes()[:100_000])


def _unpacked(path: Path) -> None:
    torch.save(official_state_dict('eca_mobilenetv2_050'), path.with_suffix('.zip'))
    shutil.unpack_archive(path.with_suffix('.zip'), path)


def _bytes(zipped: bool) -> Callable[[Path], None]:
    """A few bytes that ask for a gigabyte, which weights_only=True grants them."""
    def make(path: Path) -> None:
        torch.save(('state_dict', 'x'), path, _use_new_zipfile_serialization=zipped)
        pickled = b'\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x00\x40tR.'
        if not zipped:
            data = path.read_bytes()
            start = data.index(pickle.dumps(('state_dict', 'x'), 2)[:5])
            path.write_bytes(data[:start] + pickled + data[start:])
            return
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix('.new'), 'w') as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith('/data.pkl') else old.read(name))
        path.with_suffix('.new').rename(path)
    return make


def _two_directories(path: Path) -> None:
    """A compressed archive before whose end stands a list of harmless contents: readers differ in which they find."""
    _compressed(path)
    data = path.read_bytes()
    end = data.rindex(b'PK\x05\x06')
    offset, = struct.unpack('<L', data[end + 16:end + 20])
    harmless = data[offset:end].replace(struct.pack('<H', zipfile.ZIP_DEFLATED), b'\0\0')
    path.write_bytes(data[:end] + harmless + data[end:])


def _replace(old: bytes, new: bytes, **kwargs: Any) -> Callable[[Path], None]:
    """A small file with all of some of its bytes replaced."""
    def make(path: Path) -> None:
        torch.save({'state_dict': {'fc.weight': torch.ones(1)}}, path, **kwargs)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
    return make


def _saves(content: Any, **kwargs: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **kwargs)


def _code(path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCode()))


def _plain(name: str) -> Callable[[Path], None]:
    return lambda path: torch.save(timm.create_model(name).state_dict(), path)


def _official(
        change: Callable[[dict[str, Any]], Any],
        model: str = 'eca_resnet18',
) -> Callable[[Path], None]:
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


CONV = 'layer2.0.conv1.weight'
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    'text': (_text, 'not of torch.save or safetensors'),
    'html': (_html, 'web page'),
    'empty file': (lambda path: path.touch(), 'cut off or damaged.* 0 bytes'),
    'cut off at once': (_cut(7), 'cut off'),
    'cut off in the pickle': (_cut(3000), 'cut off or damaged'),
    'cut off in the tensors': (_cut(20_000_000), 'cut off or damaged'),
    'cut off zip': (_cut(20_000_000, zipped=True), 'cut off'),
    'tar': (_tar, 'not of torch.save or safetensors'),
    'zip': (_zip, 'not of torch.save or safetensors'),
    'compressed zip': (_compressed, 'larger than the file'),
    'bytes in a zip': (_bytes(True), 'not a state dict'),
    'bytes in a legacy file': (_bytes(False), 'not a state dict|damaged'),
    'safetensors cut off': (_safetensors_cut, 'cut off or damaged'),
    'unpacked checkpoint': (_unpacked, 'is a directory: name the file itself'),
    'pipe': (lambda path: os.mkfifo(path), 'is not a file'),
    'zip of two directories': (_two_directories, 'damaged|larger than the file'),
    'zip of overlapping records': (_overlapping, 'larger than the file'),
    'one tensor for many': (_official(_share), 'larger than the file'),
    'directory': (lambda path: path.mkdir(), 'is a directory'),
    'missing': (lambda path: None, 'name an existing checkpoint file'),
    'empty dict': (_saves({}), 'empty state dict'),
    'empty state dict': (_saves({'state_dict': {}, 'epoch': 3}), 'empty state dict'),
    'list': (_saves([torch.ones(2)]), 'not a state dict'),
    'tensor': (_saves(torch.ones(2)), 'not a state dict'),
    'plain pickle that runs code': (_code, 'not of torch.save or safetensors'),
    'zip that runs code': (_saves({'state_dict': RunsCode()}), r'would run posix\.mkdir'),
    'legacy that runs code': (
        _saves({'state_dict': RunsCode()}, _use_new_zipfile_serialization=False), r'would run posix\.mkdir'),
    'whole model': (_saves(torch.nn.Linear(2, 2)), r'would run torch\.nn\.modules\.linear\.Linear'),
    'plain resnet50': (_plain('resnet50'), 'no ECA kernels'),
    'se resnet': (_plain('seresnet50'), 'no ECA kernels'),
    'vit': (_plain('vit_tiny_patch16_224'), 'no ECA kernels'),
    'mixed kernel sizes': (
        _official(_set('layer2.1.eca.conv.weight', lambda w: torch.ones(1, 1, 3))),
        'kernel sizes of layer2 are 3, 5'),
    'even kernel sizes': (_official(lambda state_dict: state_dict.update(
        {f'layer3.{i}.eca.conv.weight': torch.ones(1, 1, 4) for i in range(2)})), 'kernel sizes of layer3 are 4'),
    'nan': (_official(_set(CONV, lambda w: _put(w, float('nan')))), 'NaN or Inf'),
    'inf': (_official(_set('layer1.0.bn1.running_var', lambda w: _put(w, float('inf')))), 'NaN or Inf'),
    'missing layer': (_official(lambda s: s.pop(CONV)), f'closest is eca_resnet18, but: {CONV} is missing'),
    'missing eca': (_official(lambda s: s.pop('layer3.1.eca.conv.weight')), r'layer3\.1\.eca\.conv\.weight is missing'),
    'extra tensor': (_official(lambda s: s.update(extra=torch.ones(1))), 'extra is not known'),
    'wrong shape': (_official(_set(CONV, lambda w: w[:, :60].clone())), r'has shape \[128, 60, 3, 3\], not'),
    'wrong eca shape': (_official(_set('layer1.0.eca.conv.weight', lambda w: torch.ones(1, 2, 3))), r'\[1, 2, 3\]'),
    'flat weight': (_official(_set(CONV, lambda w: w.flatten())), 'has shape'),
    'classifier of two minds': (_official(_set('fc.bias', lambda b: b[:999].clone())), r'fc\.bias has shape'),
    'other width': (_official(_official_width, 'eca_mobilenetv2'), 'closest is eca_mobilenetv2_050, but: features.2'),
    'float64': (_official(_set(CONV, lambda w: w.double())), 'torch.float64'),
    'int8': (_official(_set(CONV, lambda w: w.to(torch.int8))), 'torch.int8'),
    'complex': (_official(_set(CONV, lambda w: w.to(torch.complex64))), 'torch.complex64'),
    'sparse': (_official(_set(CONV, lambda w: w.to_sparse())), 'sparse'),
    'quantized': (
        _official(_set(CONV, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8))), 'sparse, quantized'),
    'meta': (_official(_set(CONV, lambda w: w.to('meta'))), 'cut off or damaged|empty'),
    'larger than its data': (_official(_set(CONV, lambda w: torch.ones(1).expand(w.shape))), 'larger than the file'),
    'not a tensor': (_official(_set(CONV, lambda w: 'weights')), 'a str and not a tensor'),
    'escapes in names': (
        _official(lambda s: s.update({'x\x1b[2J\nfake': torch.ones(1)})), r'x\\\\x1b\[2J\\\\nfake|x\\x1b'),
    'stem without dimensions': (
        _official(lambda s: (_official_width(s), s.update({'features.0.0.weight': torch.tensor(1.)})),
                  'eca_mobilenetv2'), 'closest is eca_mobilenetv2_050'),
    'float count': (_official(_set('bn1.num_batches_tracked', lambda w: torch.tensor(2.5))), 'no count'),
    # Found by tests/fuzz/fuzz.py:
    'damaged list of a zip': (_replace(b'PK\x01\x02', b'PK\x01\x03'), 'damaged'),
    'names in a zip that are no text': (_replace(b'data.pkl', b'data\xff\xff\xffl'), 'damaged'),
    'zip of 64 bits without its end': (_replace(b'PK\x06\x06', b'PK\x06\x07'), 'damaged'),
    'meta count': (_saves({'bn1.num_batches_tracked': torch.tensor(1).to('meta')}), 'meta|damaged'),
    'long name': (_saves({f'{"x" * 5000}.num_batches_tracked': torch.ones(2)}), 'no count'),
    'control characters in a class': (
        _replace(b'torch._utils', b'torch\x1b[31m', _use_new_zipfile_serialization=False), r'run torch\\x1b\[31m'),
    'key is not a string': (_saves({'state_dict': {'fc.weight': torch.ones(1), 7: torch.ones(1)}}), 'not a state dict'),
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
    ['convert', 'file', '--private'],
    ['convert', 'file', '--dry-run'],
    ['convert', 'file', 'file'],
    ['convert', '--all', '--output', 'folder'],
    ['convert', '--all', '--push-to-hub', 'organisation/name'],
    ['push', 'folder'],
    ['unknown'],
    [],
])
def test_wrong_arguments(args: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert 'See timm-eca' in capsys.readouterr().err
