"""The authors' files from Google Drive. A local server stands in for it: the tests never ask Drive itself."""
import logging
import os
import socket
import time
from collections.abc import Iterator
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
        monkeypatch.setattr(download, 'DRIVE_URL', double.url)
        monkeypatch.delenv('TIMM_ECA_DOWNLOAD')
        monkeypatch.setattr(time, 'sleep', refuse)
        yield double


@pytest.fixture(scope='module')
def folder(mobilenetv2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted folder, for reading."""
    return convert(mobilenetv2_file, tmp_path_factory.mktemp('converted') / 'folder', provenance='downloaded').folder


def _left(home: Path) -> set[str]:
    """The files in the weights directory, without the lock, which stays."""
    return {str(path.relative_to(home)) for path in home.rglob('*') if path.is_file() and path.suffix != '.lock'}


def _equal(model: torch.nn.Module, folder: Path) -> bool:
    weights = load_file(folder / 'model.safetensors')
    return all(value.equal(weights[key]) for key, value in model.state_dict().items())


def test_pretrained_downloads_once(
        drive: DriveDouble, hub: HubDouble, home: Path, folder: Path, caplog: pytest.LogCaptureFixture):
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
    assert _equal(model, folder)

    asked = len(hub.requests)
    assert _equal(create_model(MODEL, pretrained=True, features_only=True), folder)
    assert (len(hub.requests), len(drive.asked)) == (asked, 1)


def test_the_hub_comes_first(drive: DriveDouble, hub: HubDouble, home: Path, folder: Path):
    hub.add_repo(f'timm-eca/{NAME}', {path.name: path.read_bytes() for path in folder.iterdir()})
    model = create_model(MODEL, pretrained=True)
    assert _equal(model, folder)
    assert model.pretrained_cfg['hf_hub_id'] == f'timm-eca/{NAME}'
    hub.fault = lambda method, path: (503, {}, b'')
    assert _equal(create_model(MODEL, pretrained=True, num_classes=0), folder)  # from the cache
    assert drive.asked == []
    assert not home.exists()


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
    ('another model', 'it sent another checkpoint: eca_mobilenetv2_050,'), ('silence', 'ReadTimeout'),
    ('nobody there', 'ConnectError'), ('another host', 'it redirects to localhost'),
])
def test_failures_of_drive(
        change: str,
        words: str,
        drive: DriveDouble,
        home: Path,
        mobilenetv2_file: Path,
        checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """Both ways to download end in an error with the link, and leave nothing."""
    if change == 'status':
        drive.reply = (429, {'Retry-After': '3600'}, b'')
    elif change == 'quota':
        drive.reply = QUOTA_PAGE
    elif change == 'cut off':
        drive.reply = (200, {}, mobilenetv2_file.read_bytes()[:-1000])
    elif change == 'another host':
        drive.reply = (302, {'Location': drive.url.replace('127.0.0.1', 'localhost').format('other')}, b'')
        drive.files['other'] = mobilenetv2_file
    elif change == 'another model':
        drive.files[OFFICIAL_FILE.drive_id] = checkpoint
    elif change == 'silence':
        silent = socket.create_server(('127.0.0.1', 0))
        monkeypatch.setattr(download, 'DRIVE_URL', f'http://127.0.0.1:{silent.getsockname()[1]}/?id={{}}')
        monkeypatch.setattr(download, '_SILENCE', 0.2)
    else:
        monkeypatch.setattr(download, 'DRIVE_URL', 'http://127.0.0.1:9/?id={}')
    if change == 'quota':
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


def test_processes_at_once(drive: DriveDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Three processes without weights: one download, and the same weights for all."""
    monkeypatch.setattr(time, 'sleep', lambda seconds, sleep=os.sched_yield: sleep())
    children = [
        fork(lambda: 0 if _equal(create_model(MODEL, pretrained=True), folder) else 1) for _ in range(3)]
    assert [wait(child) for child in children] == [0] * 3
    assert len(drive.asked) == 1


def test_a_weights_directory_that_cant_be_written(drive: DriveDouble, home: Path):
    resource = pytest.importorskip('resource')

    def load() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))  # a full disk
        try:
            create_model(MODEL, pretrained=True)
        except WeightsNotFoundError as e:
            return 2 if 'can\'t be written' in e.problem else 3
        return 0

    assert wait(fork(load)) == 2
    assert _left(home) == set()
    (home / '.downloads').rename(home / 'moved')
    (home / '.downloads').write_text('')
    with pytest.raises(WeightsNotFoundError, match=r'\.downloads can\'t be written .* TIMM_ECA_HOME'):
        create_model(MODEL, pretrained=True)


def test_download_command(
        drive: DriveDouble, home: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It asks Drive only if it can use the file."""
    output = tmp_path / 'output'
    output.mkdir()
    for options, words in (
            ([MODEL, '--output', str(output)], '--force'), ([MODEL, '--tag', 'a/b'], 'a tag'), (['resnet18'], MODEL)):
        assert main(['convert', '--download', *options]) == 2
        assert words in capsys.readouterr().err
    assert drive.asked == []
    assert main(['convert', '--download', MODEL, '--output', str(output), '--force']) == 0
    assert OFFICIAL_FILE.file in capsys.readouterr().out
    assert (output / 'config.json').read_bytes() == (folder / 'config.json').read_bytes()
    assert _left(home) == set()
