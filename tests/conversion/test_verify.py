"""`timm-eca verify` finds and names changes in a folder."""
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.hub_double import HubDouble
from helpers.image_folders import FAST, draw
from safetensors.torch import load_file, save_file
from timm.models import create_model

from timm_eca.commands.main import main
from timm_eca.conversion.convert import convert
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.key_maps import to_official

MODEL = 'eca_mobilenetv2_050'


@pytest.fixture(scope='module')
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its converted folder, for reading."""
    root = tmp_path_factory.mktemp('verify')
    torch.save(to_official(create_model(MODEL).state_dict()), root / 'file.pth')
    convert(root / 'file.pth', root / 'folder')
    return root


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted folder of the test's own."""
    return Path(shutil.copytree(converted / 'folder', tmp_path / 'folder'))


def _flip(folder: Path) -> None:
    """One bit of the last tensor in the file."""
    path = folder / 'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def _retype(folder: Path) -> None:
    tensors = load_file(folder / 'model.safetensors')
    tensors['bn1.weight'] = tensors['bn1.weight'].to(torch.float8_e4m3fn)
    save_file(tensors, folder / 'model.safetensors')


def _last_tensor(folder: Path) -> str:
    data = (folder / 'model.safetensors').read_bytes()
    header = json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])
    return max((entry['data_offsets'][1], name) for name, entry in header.items() if name != '__metadata__')[1]


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + '\n')
    return change


def _pretrained_cfg(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / 'config.json').read_text())
        _config(pretrained_cfg=config['pretrained_cfg'] | changes)(folder)
    return change


def test_an_untouched_folder(folder: Path, converted: Path, capsys: pytest.CaptureFixture[str]):
    """All is well, also after an edit of the card. Another source is not the one that was converted."""
    checkpoint = converted / 'file.pth'
    assert main(['verify', str(folder), '--checkpoint', str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert [line for line in lines if not line.startswith('ok ')] == [
        f'-     SHA-256 of model.safetensors: {file_sha256(folder / "model.safetensors")}',
        f'-     converted from file.pth, SHA-256 {file_sha256(checkpoint)}, not known to be the authors\' file']
    (folder / 'README.md').write_text('The best model ever.')
    assert main(['verify', str(folder)]) == 0

    other = folder.parent / 'other.pth'
    torch.save(to_official(create_model(MODEL).state_dict()), other)
    assert main(['verify', str(folder), '--checkpoint', str(other)]) == 1
    assert 'not equal to the source\'s' in capsys.readouterr().out
    assert main(['verify', str(folder), '--checkpoint', 'nowhere.pth']) == 2
    assert main(['verify', 'nowhere']) == 2


@pytest.mark.parametrize(('change', 'words'), [
    (_flip, '{last}'),
    (_config(model_args={'kernel_sizes': [3] * 7}), 'attn.conv.weight'),
    (_config(architecture='nonsense'), "timm has no model 'nonsense'"),
    (_pretrained_cfg(mean=[0.5, 0.5, 0.5]), 'not equal to their recorded digests: config.json'),
    (_config(label_names=['cat'] * 1000), 'not equal to their recorded digests: config.json'),
    (_retype, '\'bn1.weight\' of type F8_E4M3'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'rubbish'), 'not a whole safetensors'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'not a whole safetensors'),
])
def test_what_was_changed_is_named(
        folder: Path, change: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]):
    last = _last_tensor(folder)
    change(folder)
    assert main(['verify', str(folder)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith('WRONG ')]
    assert any(words.format(last=last) in line for line in wrong), wrong


def test_a_repository(folder: Path, hub: HubDouble, capsys: pytest.CaptureFixture[str]):
    hub.add_repo('timm-eca/mine', {path.name: path.read_bytes() for path in folder.iterdir()})
    assert main(['verify', 'hf-hub:timm-eca/mine']) == 0
    assert capsys.readouterr().out.count('ok ') == 3


def test_a_folder_without_digests(folder: Path, capsys: pytest.CaptureFixture[str]):
    """It may be right. What can't be compared is said."""
    save_file(load_file(folder / 'model.safetensors'), folder / 'model.safetensors')
    assert main(['verify', str(folder)]) == 0
    assert 'no digests of its tensors and of config.json' in capsys.readouterr().out


@pytest.mark.slow
def test_the_folder_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip('accelerate')
    tree = draw(tmp_path / 'tree', {'red': 8, 'green': 8})
    assert main(['finetune', str(tree), *FAST, '--epochs', '1', '--output', str(tmp_path / 'out')]) == 0
    assert main(['verify', str(tmp_path / 'out')]) == 0
    assert '--output out' in (tmp_path / 'out' / 'README.md').read_text()
    last = _last_tensor(tmp_path / 'out')
    _flip(tmp_path / 'out')
    _pretrained_cfg(std=[0.4, 0.4, 0.4])(tmp_path / 'out')
    capsys.readouterr()
    assert main(['verify', str(tmp_path / 'out')]) == 1
    printed = capsys.readouterr().out
    assert f'not equal to their recorded digests: config.json, {last}' in printed
