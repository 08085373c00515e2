"""The authors' files from Google Drive. A local server stands in for it: the tests never ask Drive itself."""
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.drive_double import QUOTA_PAGE, DriveDouble, drive_double
from helpers.forked import fork, wait
from helpers.hub_double import HubDouble
from huggingface_hub import constants
from safetensors.torch import load_file
from timm.models import create_model

from timm_eca.commands.main import main
from timm_eca.conversion import download
from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.weights.official import OFFICIAL
from timm_eca.weights.store import WeightsNotFoundError

MODEL, NAME = 'eca_mobilenetv2', 'eca_mobilenetv2.bangguwu_in1k'
OFFICIAL_FILE = OFFICIAL[MODEL]


@pytest.fixture
def drive(hub: HubDouble, mobilenetv2_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DriveDouble]:
    """A Drive with the MobileNetV2, beside a Hub without weights. The client may not wait and try again."""
    def refuse(seconds: float) -> None:
        raise AssertionError(f'the client waits {seconds} seconds')

    with drive_double() as double:
        double.files[OFFICIAL_FILE.drive_id] = mobilenetv2_file
        monkeypatch.setattr(download, 'DRIVE_URL', double.url + '/download?id={}&export=download&confirm=t')
        monkeypatch.delenv('TIMM_ECA_DOWNLOAD')
        monkeypatch.setattr(time, 'sleep', refuse)
        yield double


def _left(home: Path) -> set[str]:
    """The files in the weights directory, without the lock, which stays."""
    return {str(path.relative_to(home)) for path in home.rglob('*') if path.is_file() and path.suffix != '.lock'}


def _equal(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(value.equal(weights[key]) for key, value in model.state_dict().items())


def test_pretrained_downloads_once(
        drive: DriveDouble,
        hub: HubDouble,
        home: Path,
        mobilenetv2_file: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
):
    (home / '.downloads').mkdir(parents=True)
    (home / '.downloads' / OFFICIAL_FILE.file).write_bytes(b'half')  # from a process that was killed
    with caplog.at_level(logging.INFO, 'timm_eca'):
        model = create_model(MODEL, pretrained=True)
    assert drive.asked == [OFFICIAL_FILE.drive_id]
    assert [request.method for request in hub.requests if 'resolve' in request.path] == ['HEAD']  # one question
    [line] = [record.getMessage() for record in caplog.records if record.name == download.__name__]
    assert 'Google Drive' in line
    assert OFFICIAL_FILE.url in line
    assert _left(home) == {f'{NAME}/{name}' for name in ('README.md', 'config.json', 'model.safetensors')}
    by_hand = convert(mobilenetv2_file, tmp_path / 'by_hand', provenance='downloaded').folder / 'model.safetensors'
    weights = load_file(by_hand)
    assert _equal(model, weights)

    asked = len(hub.requests)
    assert _equal(create_model(MODEL, pretrained=True, features_only=True), weights)
    assert (len(hub.requests), len(drive.asked)) == (asked, 1)


def test_the_hub_comes_first(drive: DriveDouble, hub: HubDouble, home: Path, mobilenetv2_file: Path, tmp_path: Path):
    folder = convert(mobilenetv2_file, tmp_path / 'folder', provenance='vouched').folder
    hub.add_repo(f'timm-eca/{NAME}', {path.name: path.read_bytes() for path in folder.iterdir()})
    weights = load_file(folder / 'model.safetensors')
    model = create_model(MODEL, pretrained=True)
    assert _equal(model, weights)
    assert model.pretrained_cfg['hf_hub_id'] == f'timm-eca/{NAME}'
    hub.fault = lambda method, path: (503, {}, b'')
    assert _equal(create_model(MODEL, pretrained=True, num_classes=0), weights)  # from the cache
    assert drive.asked == []
    assert not home.exists()


@pytest.mark.parametrize('change', ['unreachable', 'unavailable', 'login page', 'pickle only'])
def test_a_hub_without_the_weights(change: str, drive: DriveDouble, hub: HubDouble, monkeypatch: pytest.MonkeyPatch):
    """The client asks the Hub once, without waiting, and Drive next."""
    if change == 'unreachable':
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    elif change == 'pickle only':
        hub.add_repo(f'timm-eca/{NAME}', {'config.json': b'{}', 'pytorch_model.bin': b'no'})
    else:
        reply = (503, {}, b'') if change == 'unavailable' else (200, {}, b'<html>')
        hub.fault = lambda method, path: reply
    drive.reply = (403, {}, b'')
    with pytest.raises(WeightsNotFoundError, match='Google Drive: HTTP 403') as error:
        create_model(MODEL, pretrained=True)
    assert len(error.value.sources) == 3
    assert len(drive.asked) == 1


def test_switched_off(drive: DriveDouble, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('TIMM_ECA_DOWNLOAD', '0')
    with pytest.raises(WeightsNotFoundError, match='Google Drive: switched off by TIMM_ECA_DOWNLOAD=0'):
        create_model(MODEL, pretrained=True)
    monkeypatch.delenv('TIMM_ECA_DOWNLOAD')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsNotFoundError, match='unset HF_HUB_OFFLINE'):
        create_model(MODEL, pretrained=True)
    assert main(['convert', '--download', MODEL]) == 2
    assert drive.asked == []
    assert _left(home) == set()


@pytest.mark.parametrize(('change', 'words'), [
    ('status', 'HTTP 429'), ('quota', 'is a web page'), ('cut off', 'cut off or damaged'),
    ('another host', 'it redirects to localhost'), ('another model', 'it sent another checkpoint: eca_resnet18,'),
    ('part of the model', 'it sent another checkpoint: eca_mobilenetv2,'), ('silence', 'ReadTimeout'),
    ('nobody there', 'ConnectError'), ('endless', 'it sent more than'), ('code', 'holds more than tensors'),
])
def test_failures_of_drive(
        change: str,
        words: str,
        drive: DriveDouble,
        home: Path,
        mobilenetv2_file: Path,
        resnet18_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """Both ways to download end in an error with the link, and leave nothing."""
    content = mobilenetv2_file.read_bytes()
    drive.files[OFFICIAL_FILE.drive_id] = resnet18_file if change == 'another model' else tmp_path / 'other'
    if change == 'status':
        drive.reply = (429, {'Retry-After': '3600'}, b'')
    elif change == 'quota':
        drive.reply = QUOTA_PAGE
    elif change == 'cut off':
        drive.reply = (200, {'Content-Length': ''}, content[:-1000])
    elif change == 'another host':
        drive.reply = (302, {'Location': f'{drive.url.replace("127.0.0.1", "localhost")}/download?id=other'}, b'')
        answer = drive.answer
        monkeypatch.setattr(drive, 'answer', lambda path: (200, {}, content) if 'other' in path else answer(path))
    elif change == 'part of the model':
        state_dict = torch.load(mobilenetv2_file, 'cpu', weights_only=True)['state_dict']
        torch.save({key: value for key, value in state_dict.items() if 'classifier' not in key}, tmp_path / 'other')
    elif change == 'silence':
        silent = socket.create_server(('127.0.0.1', 0))
        monkeypatch.setattr(download, 'DRIVE_URL', f'http://127.0.0.1:{silent.getsockname()[1]}/?id={{}}')
        monkeypatch.setattr(download, '_SILENCE', 0.2)
    elif change == 'nobody there':
        monkeypatch.setattr(download, 'DRIVE_URL', 'http://127.0.0.1:9/?id={}')
    elif change == 'endless':
        drive.reply = (200, {}, content)
        monkeypatch.setattr(download, '_MAX_BYTES', 2 ** 20)
    elif change == 'code':
        torch.save({'state_dict': print}, tmp_path / 'other')
    with pytest.raises(WeightsNotFoundError) as error:
        create_model(MODEL, pretrained=True)
    assert words in error.value.sources[2]
    assert OFFICIAL_FILE.url in error.value.fixes[2]
    assert main(['convert', '--download', MODEL]) == 2
    sentence = capsys.readouterr().err
    assert words in sentence
    assert OFFICIAL_FILE.url in sentence
    assert sentence.count('\n') == 1
    assert _left(home) == set()


def test_processes_at_once(drive: DriveDouble, home: Path, mobilenetv2_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Four processes without weights: one download, and the same weights for all."""
    monkeypatch.setattr(time, 'sleep', lambda seconds, sleep=os.sched_yield: sleep())
    weights = load_file(convert(mobilenetv2_file, home / 'other', provenance='vouched').folder / 'model.safetensors')
    children = [
        fork(lambda: 0 if _equal(create_model(MODEL, pretrained=True), weights) else 1) for _ in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    assert len(drive.asked) == 1


def test_a_weights_directory_that_cant_be_written(drive: DriveDouble, home: Path, capsys: pytest.CaptureFixture[str]):
    home.write_text('')
    with pytest.raises(WeightsNotFoundError, match=r'\.downloads can\'t be written .* TIMM_ECA_HOME'):
        create_model(MODEL, pretrained=True)
    assert main(['convert', '--download', MODEL]) == 2
    assert 'TIMM_ECA_HOME' in capsys.readouterr().err
    assert drive.asked == []


def test_a_full_disk(drive: DriveDouble, home: Path):
    resource = pytest.importorskip('resource')

    def load() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
        try:
            create_model(MODEL, pretrained=True)
        except WeightsNotFoundError as e:
            return 2 if 'can\'t be written' in e.problem else 3
        return 0

    assert wait(fork(load)) == 2
    assert _left(home) == set()


def test_download_command(drive: DriveDouble, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['convert', '--download', MODEL]) == 0
    assert OFFICIAL_FILE.file in capsys.readouterr().out
    assert main(['convert', '--download', MODEL]) == 2
    assert '--force' in capsys.readouterr().err
    assert len(drive.asked) == 1  # it asks Drive only if it can use the file
    assert main(['convert', '--download', MODEL, '--force']) == 0
    assert main(['convert', '--download', MODEL, '--output', str(tmp_path / 'folder')]) == 0
    assert (tmp_path / 'folder' / 'config.json').is_file()
    asked = len(drive.asked)
    for options in (['--mean', '0.5'], ['--tag', 'a/b'], ['--output', '']):
        with suppress(SystemExit):
            assert main(['convert', '--download', MODEL, *options]) == 2
    assert main(['convert', '--download', 'resnet18']) == 2
    assert MODEL in capsys.readouterr().err
    with pytest.raises(CheckpointError, match='published no file'):
        download.convert_download('eca_resnet26t')
    assert len(drive.asked) == asked
    assert not [path for path in _left(home) if not path.startswith(NAME)]
