"""The authors' files from Google Drive, which a local server stands in for; Drive itself is never asked."""
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from helpers.drive_double import FAILURES, DriveDouble, drive_double
from helpers.forked import fork, wait
from helpers.hub_double import HubDouble
from huggingface_hub import constants
from safetensors.torch import load_file

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
    """A Drive with the MobileNetV2, beside a Hub without weights. The client never waits."""
    def refuse(seconds: float) -> None:
        raise AssertionError(f'the client waits {seconds} seconds')

    with drive_double() as double:
        double.files[OFFICIAL_FILE.drive_id] = mobilenetv2_file
        monkeypatch.setattr(download, 'DRIVE_URL', double.url + '/download?id={}&export=download&confirm=t')
        monkeypatch.delenv('TIMM_ECA_DOWNLOAD')
        monkeypatch.setattr(time, 'sleep', refuse)
        yield double


def _left(home: Path) -> set[str]:
    """What is in the weights directory, without the lock, which stays."""
    return {str(path.relative_to(home)) for path in home.rglob('*') if path.is_file() and path.suffix != '.lock'}


def test_pretrained_downloads_once(
        drive: DriveDouble,
        hub: HubDouble,
        home: Path,
        mobilenetv2_file: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
):
    with caplog.at_level(logging.INFO, 'timm_eca'):
        model = timm.create_model(MODEL, pretrained=True)
    assert drive.asked == [OFFICIAL_FILE.drive_id]
    assert [request.method for request in hub.requests if 'resolve' in request.path] == ['HEAD']  # one question
    [line] = [record.getMessage() for record in caplog.records if record.name == download.__name__]
    assert 'Google Drive' in line
    assert OFFICIAL_FILE.url in line
    assert _left(home) == {f'{NAME}/{name}' for name in ('README.md', 'config.json', 'model.safetensors')}
    by_hand = convert(mobilenetv2_file, tmp_path / 'by_hand', provenance='downloaded').folder / 'model.safetensors'
    assert (home / NAME / 'model.safetensors').read_bytes() == by_hand.read_bytes()
    weights = load_file(by_hand)
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())

    asked = len(hub.requests)
    features = timm.create_model(MODEL, pretrained=True, features_only=True)
    assert all(value.equal(weights[key]) for key, value in features.state_dict().items())
    assert (len(hub.requests), len(drive.asked)) == (asked, 1)


@pytest.mark.parametrize('kwargs', [{'num_classes': 3}, {'features_only': True}, {'in_chans': 1}])
def test_first_download_of_other_forms(kwargs: dict[str, object], drive: DriveDouble):
    first = timm.create_model(MODEL, pretrained=True, **kwargs)
    second = timm.create_model(MODEL, pretrained=True, **kwargs)
    assert len(drive.asked) == 1
    tensors = second.state_dict()
    assert all(value.equal(tensors[key]) for key, value in first.state_dict().items() if 'classifier' not in key)
    assert first.pretrained_cfg == second.pretrained_cfg


def test_the_hub_comes_first(drive: DriveDouble, hub: HubDouble, home: Path, mobilenetv2_file: Path, tmp_path: Path):
    folder = convert(mobilenetv2_file, tmp_path / 'folder', provenance='vouched').folder
    hub.add_repo(f'timm-eca/{NAME}', {path.name: path.read_bytes() for path in folder.iterdir()})
    timm.create_model(MODEL, pretrained=True)
    hub.fault = lambda method, path: (503, {}, b'')  # in its cache
    timm.create_model(MODEL, pretrained=True)
    assert drive.asked == []
    assert not home.exists()


@pytest.mark.parametrize('change', ['unreachable', 'unavailable', 'login page', 'forbidden', 'pickle only'])
def test_a_hub_that_does_not_help(change: str, drive: DriveDouble, hub: HubDouble, monkeypatch: pytest.MonkeyPatch):
    """It is asked once, without waiting, and Drive next."""
    if change == 'unreachable':
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    elif change == 'pickle only':
        hub.add_repo(f'timm-eca/{NAME}', {'pytorch_model.bin': b'no'})
    else:
        replies = {'unavailable': (503, {}, b''), 'login page': (200, {}, b'<html>'), 'forbidden': (403, {}, b'')}
        hub.fault = lambda method, path: replies[change]
    drive.reply = FAILURES['forbidden']
    with pytest.raises(WeightsNotFoundError, match='Google Drive: HTTP 403'):
        timm.create_model(MODEL, pretrained=True)
    assert len(drive.asked) == 1


def test_switched_off(drive: DriveDouble, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('TIMM_ECA_DOWNLOAD', '0')
    with pytest.raises(WeightsNotFoundError, match='TIMM_ECA_DOWNLOAD=0'):
        timm.create_model(MODEL, pretrained=True)
    monkeypatch.delenv('TIMM_ECA_DOWNLOAD')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsNotFoundError, match='unset HF_HUB_OFFLINE') as error:
        timm.create_model(MODEL, pretrained=True)
    assert 'connection' not in str(error.value)
    assert main(['convert', '--download', MODEL]) == 2
    assert drive.asked == []
    assert not [path for path in home.rglob('*') if path.is_file() and path.suffix != '.lock']


def _expect_failure(words: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways end in a short error with the link, and leave nothing."""
    with pytest.raises(WeightsNotFoundError) as error:
        timm.create_model(MODEL, pretrained=True)
    assert main(['convert', '--download', MODEL]) == 2
    sentence = capsys.readouterr().err
    for text in (str(error.value), sentence):
        assert words in text
        assert OFFICIAL_FILE.url in text
        assert text.replace('\n', '').isprintable()
    assert sentence.count('\n') == 1
    assert len(sentence) < 400
    assert error.value.__suppress_context__
    assert _left(home) == set()


@pytest.mark.parametrize(('name', 'words'), [
    ('quota', 'a web page'), ('confirmation', 'a web page'),
    ('page without a title', 'a web page'), ('page called a file', 'a web page'), ('forbidden', 'HTTP 403'),
    ('not found', 'HTTP 404'), ('too many requests', 'HTTP 429'), ('internal error', 'HTTP 500'),
    ('proxy wants a login', 'HTTP 511'), ('redirect in a circle', 'redirects'), ('empty', '0 bytes'),
    ('no checkpoint', 'not of torch.save'), ('bad length', 'ProtocolError'),
])
def test_failures_of_drive(
        name: str, words: str, drive: DriveDouble, home: Path, capsys: pytest.CaptureFixture[str]):
    drive.reply = FAILURES[name]
    _expect_failure(words, home, capsys)


@pytest.mark.parametrize('change', [
    'cut off', 'cut off without a length', 'another host', 'another model', 'silence', 'nobody there', 'endless',
    'compressed', 'code',
])
def test_more_failures(
        change: str,
        drive: DriveDouble,
        home: Path,
        mobilenetv2_file: Path,
        resnet18_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    content = mobilenetv2_file.read_bytes()
    words = change
    if change == 'cut off':
        drive.reply, words = (200, {'Content-Length': str(len(content))}, content[:-1000]), 'ProtocolError'
    elif change == 'cut off without a length':
        drive.reply, words = (200, {'Content-Length': ''}, content[:-1000]), 'cut off or damaged'
    elif change == 'another host':
        other = f'{drive.url.replace("127.0.0.1", "localhost")}/download?id=other'
        drive.reply, words = (302, {'Location': other}, b''), 'it redirects to localhost'
        original = drive.answer
        monkeypatch.setattr(drive, 'answer', lambda path: (200, {}, content) if 'other' in path else original(path))
    elif change == 'another model':
        state_dict = torch.load(mobilenetv2_file, 'cpu', weights_only=True)['state_dict']
        torch.save({key: value for key, value in state_dict.items() if 'classifier' not in key}, tmp_path / 'other')
        drive.files[OFFICIAL_FILE.drive_id], words = tmp_path / 'other', 'not a checkpoint as the authors published it'
    elif change == 'silence':
        silent = socket.create_server(('127.0.0.1', 0))
        monkeypatch.setattr(download, 'DRIVE_URL', f'http://127.0.0.1:{silent.getsockname()[1]}/?id={{}}')
        monkeypatch.setattr(download, '_SILENCE', 0.2)
        words = 'ReadTimeout'
    elif change == 'nobody there':
        monkeypatch.setattr(download, 'DRIVE_URL', 'http://127.0.0.1:9/?id={}')
        words = 'ConnectError'
    elif change == 'endless':
        monkeypatch.setattr(download, '_MAX_BYTES', 2 ** 20)
        words = 'more than'
    elif change == 'compressed':
        drive.reply, words = (200, {'Content-Encoding': 'gzip'}, b'no gzip'), 'DecodingError'
    else:
        torch.save({'state_dict': print}, tmp_path / 'code')
        drive.files[OFFICIAL_FILE.drive_id], words = tmp_path / 'code', 'holds more than tensors'
    _expect_failure(words, home, capsys)


def test_a_file_of_another_published_model(drive: DriveDouble, resnet18_file: Path, home: Path):
    """It is converted for what it is, and never loaded for another."""
    drive.files[OFFICIAL_FILE.drive_id] = resnet18_file
    with pytest.raises(WeightsNotFoundError, match='what it sent is eca_resnet18'):
        timm.create_model(MODEL, pretrained=True)
    assert not (home / NAME).exists()


def test_processes_at_once(drive: DriveDouble, home: Path, mobilenetv2_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight processes without weights: one download, one conversion, and the same weights for all."""
    monkeypatch.setattr(time, 'sleep', lambda seconds, sleep=os.sched_yield: sleep())
    wanted = convert(mobilenetv2_file, home / 'other', provenance='vouched').folder / 'model.safetensors'
    weights = load_file(wanted)

    def load() -> int:
        model = timm.create_model(MODEL, pretrained=True)
        return 0 if all(value.equal(weights[key]) for key, value in model.state_dict().items()) else 1

    children = [fork(load) for _ in range(8)]
    assert [wait(child) for child in children] == [0] * 8
    assert len(drive.asked) == 1
    assert not (home / '.downloads' / OFFICIAL_FILE.file).exists()


def test_what_a_killed_process_left_is_replaced(drive: DriveDouble, home: Path):
    (home / '.downloads').mkdir(parents=True)
    (home / '.downloads' / OFFICIAL_FILE.file).write_bytes(b'half')
    timm.create_model(MODEL, pretrained=True)
    assert not (home / '.downloads' / OFFICIAL_FILE.file).exists()


def test_a_weights_directory_that_cant_be_written(drive: DriveDouble, home: Path, capsys: pytest.CaptureFixture[str]):
    home.write_text('')
    with pytest.raises(WeightsNotFoundError, match=r'\.downloads can\'t be written .* TIMM_ECA_HOME'):
        timm.create_model(MODEL, pretrained=True)
    assert main(['convert', '--download', MODEL]) == 2
    assert 'TIMM_ECA_HOME' in capsys.readouterr().err
    assert drive.asked == []


@pytest.mark.parametrize('size', [0, 10 ** 6, 16 * 10 ** 6])
def test_a_full_disk(size: int, drive: DriveDouble, home: Path, mobilenetv2_file: Path):
    """In the download, and in the conversion."""
    resource = pytest.importorskip('resource')
    assert mobilenetv2_file.stat().st_size > 10 ** 6

    def load() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            timm.create_model(MODEL, pretrained=True)
        except WeightsNotFoundError as e:
            return 2 if 'can\'t be written' in str(e) else 3
        return 0

    assert wait(fork(load)) == (2 if size <= 10 ** 6 else 0)
    assert {path for path in _left(home) if not path.startswith(NAME)} == set()
    timm.create_model(MODEL, pretrained=True)


def test_download_command(drive: DriveDouble, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['convert', '--download', MODEL]) == 0
    assert OFFICIAL_FILE.file in capsys.readouterr().out
    assert main(['convert', '--download', MODEL]) == 2
    assert '--force' in capsys.readouterr().err
    assert len(drive.asked) == 1  # nothing is downloaded for nothing
    assert main(['convert', '--download', MODEL, '--force']) == 0
    assert main(['convert', '--download', MODEL, '--output', str(tmp_path / 'folder')]) == 0
    assert (tmp_path / 'folder' / 'config.json').is_file()
    asked = len(drive.asked)
    for options in (['--mean', '0.5'], ['--tag', 'a/b'], ['--output', '']):
        with suppress(SystemExit):
            assert main(['convert', '--download', MODEL, *options]) == 2
    assert len(drive.asked) == asked
    assert main(['convert', '--download', 'resnet18']) == 2
    assert MODEL in capsys.readouterr().err
    with pytest.raises(CheckpointError, match='published no file'):
        download.convert_download('eca_resnet26t')
    assert not [path for path in _left(home) if not path.startswith(NAME)]
