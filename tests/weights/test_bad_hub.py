"""A Hub that fails in a push or a download."""
import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.hub_double import HubDouble, Reply
from huggingface_hub import constants
from timm.models import create_model, save_for_hf

from timm_eca.analysis.predict import load_model
from timm_eca.commands import process
from timm_eca.commands.main import main
from timm_eca.conversion.pretrained import find_pretrained
from timm_eca.weights.hub import HubError, push_folder
from timm_eca.weights.store import WeightsNotFoundError

REPO = 'timm-eca/mine'
FILES = ('README.md', 'config.json', 'model.safetensors')
OLD = {name: f'the old {name}'.encode() for name in FILES}
TWIN, PLAIN = 'eca_test_resnet.r160_in1k', 'timm/test_resnet.r160_in1k'  # a warm start and its weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_for_hf(create_model('eca_test_resnet', num_classes=3), tmp_path / 'folder', safe_serialization=True)
    (tmp_path / 'folder' / 'README.md').write_text('---\nlicense: mit\n---\nA card.')
    return tmp_path / 'folder'


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client wanted to wait between its attempts."""
    slept: list[float] = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    return slept


def _raise(error: type[Exception]) -> Reply:
    raise error


@pytest.mark.parametrize('name', ['internal error', 'reset after the commit', 'web page'])
def test_push_is_whole_or_absent(name: str, hub: HubDouble, folder: Path, slept: list[float]):
    """With a fault at the commit."""
    faults = {
        'internal error': lambda: (500, {}, b'oops'), 'reset after the commit': lambda: _raise(ConnectionAbortedError),
        'web page': lambda: (200, {'Content-Type': 'text/html'}, b'<html>Log in'),
    }
    new = {name: (folder / name).read_bytes() for name in FILES}
    repo = hub.add_repo(REPO, OLD)
    before = len(repo.log())
    hub.fault = lambda method, path: faults[name]() if '/commit/' in path else None
    with pytest.raises(HubError) as error:
        push_folder(folder, REPO)
    assert hub.url in str(error.value)
    assert hub.token not in str(error.value)
    hub.fault = None
    assert {name: repo.head().files[name] for name in FILES} in (OLD, new)
    push_folder(folder, REPO)
    assert {name: repo.head().files[name] for name in FILES} == new
    assert len(repo.log()) == before + 1


def test_stalls_end(
        hub: HubDouble,
        folder: Path,
        slept: list[float],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """The client itself waits forever for an answer to a commit."""
    monkeypatch.setattr(process, 'SILENCE', 0.3)
    repo = hub.add_repo(REPO, OLD)

    def stall(method: str, path: str) -> Reply | None:
        if '/commit/' in path:
            threading.Event().wait(1)
            raise ConnectionError
        return None

    hub.fault = stall
    assert main(['push', str(folder), REPO]) == 2
    assert 'ReadTimeout' in capsys.readouterr().err
    assert repo.head().files['config.json'] == OLD['config.json']


def test_the_token_goes_nowhere_else(
        hub: HubDouble, folder: Path, slept: list[float], capfd: pytest.CaptureFixture[str]):
    with HubDouble() as other:
        for status in (302, 307):
            hub.add_repo(REPO, OLD)
            for part in ('repos/create', 'preupload', '/commit/'):
                hub.fault = lambda method, path, status=status, part=part: (
                    (status, {'Location': f'{other.url}/x'}, b'') if part in path else None)
                main(['push', str(folder), REPO])
        assert len(other.requests) >= 4
        assert not [request for request in other.requests if hub.token in str(request)]
    assert hub.token not in ''.join(capfd.readouterr())


def test_a_wrong_token_is_in_no_file(
        hub: HubDouble,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
):
    token = 'hf_' + 'wrong' * 7
    monkeypatch.setenv('HF_TOKEN', token)
    assert main(['push', str(folder), REPO]) == 2
    captured = ''.join(capfd.readouterr())
    assert captured.count('\n') == 1
    assert 'hf auth login' in captured
    assert token not in captured
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and token.encode() in path.read_bytes()]
    assert not hub.repos


@pytest.fixture
def weights(hub: HubDouble, tmp_path: Path) -> bytes:
    """Weights of a plain model on the Hub."""
    save_for_hf(create_model('test_resnet'), tmp_path / 'plain', safe_serialization=True)
    content = {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()}
    hub.add_repo(PLAIN, content)
    return content['model.safetensors']


def _create() -> WeightsNotFoundError | None:
    """Creates the model, or returns the error."""
    try:
        create_model(TWIN, pretrained=True)
    except WeightsNotFoundError as e:
        return e
    return None


@pytest.mark.parametrize(('name', 'why', 'fix'), [
    ('reset', 'RemoteProtocolError', 'check the connection'), ('unavailable', '503', 'check the connection'),
    ('not there', 'no public repository', 'hf auth login'), ('not implemented', 'HTTP 501', 'HF_HUB_DISABLE_XET=1'),
    ('login page', 'FileMetadataError', ''),
])
def test_one_request(name: str, why: str, fix: str, hub: HubDouble, weights: bytes, slept: list[float]):
    """Without the weights in the cache, a warm start asks the Hub once, and never waits."""
    replies: dict[str, Reply] = {
        'unavailable': (503, {}, b''), 'not there': (404, {}, b''), 'not implemented': (501, {}, b''),
        'login page': (200, {'Content-Type': 'text/html'}, b'<html>Log in')}
    hub.fault = lambda method, path: replies[name] if name in replies else _raise(ConnectionError)
    error = _create()
    assert error is not None
    assert why in error.sources[1]
    assert fix in error.fixes[0]
    assert hub.token not in str(error)
    assert [request.method for request in hub.requests] == ['HEAD'] * (2 if name == 'login page' else 1)
    assert slept == []
    with pytest.raises(WeightsNotFoundError):  # the same for a model of timm's own
        find_pretrained('test_resnet.r160_in1k')
    assert slept == []
    hub.fault = None
    assert _create() is None
    hub.requests.clear()  # the fixture takes a 501 for a mistake


def test_a_server_without_xet(hub: HubDouble, weights: bytes, slept: list[float], monkeypatch: pytest.MonkeyPatch):
    """It announces Xet, and answers 404 to the request for its token."""
    pytest.importorskip('hf_xet')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    headers = {
        'X-Repo-Commit': '0' * 40, 'ETag': f'"{hashlib.sha256(weights).hexdigest()}"',
        'X-Linked-Size': str(len(weights)), 'X-Xet-Hash': '0' * 64,
        'X-Xet-Refresh-Route': f'{hub.url}/api/models/{PLAIN}/xet-read-token/main'}
    hub.fault = lambda method, path: (
        (200, headers, b'') if method == 'HEAD' else (404, {}, b'') if 'xet-read-token' in path else None)
    error = _create()
    assert error is not None
    assert 'this server can\'t do that (HTTP 404)' in error.sources[1]
    assert 'HF_HUB_DISABLE_XET=1' in error.fixes[0]
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    hub.fault = None
    assert _create() is None


def test_downloads_are_hashed_once(hub: HubDouble, weights: bytes, slept: list[float], tmp_path: Path):
    """A download that differs from its digest is refused. A file in the cache is not read again for that."""
    lie = bytearray(weights)
    lie[-5] ^= 1
    hub.fault = lambda method, path: (200, {}, bytes(lie)) if method == 'GET' else None
    error = _create()
    assert error is not None
    assert 'SHA-256' in error.sources[1]
    hub.fault = None
    assert _create() is None

    repo = hub.repos[PLAIN]
    digest = hashlib.sha256(lie).hexdigest()
    repo.objects[digest] = bytes(lie)
    files = dict(repo.head().files) | {'model.safetensors': bytes(lie)}
    repo.add_commit('refs/heads/main', repo.head(), 'new weights', '', files, {'model.safetensors': digest})
    assert _create() is None  # downloads the new weights
    [blob] = (tmp_path / 'hub').rglob(f'blobs/{digest}')
    blob.write_bytes(weights)
    assert _create() is None
    blob.write_bytes(b'not whole')
    error = _create()
    assert error is not None
    assert 'SafetensorError' in error.sources[1]
    assert 'cache' in error.fixes[0]


def test_models_of_repositories(hub: HubDouble, folder: Path, slept: list[float]):
    """As `predict` loads them: with any spelling of the source, and only what the Hub announced."""
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo('somebody/safe', content)
    for name in ('hf-hub:somebody/safe', 'HF_hub:somebody/safe@main', f'local-dir:{folder}'):
        assert load_model(name).num_classes == 3
    hub.add_repo('somebody/other', content)
    lie = content['model.safetensors'][:-3] + b'???'
    hub.fault = lambda method, path: (200, {}, lie) if method == 'GET' and 'model.safetensors' in path else None
    with pytest.raises(HubError, match='SHA-256'):
        load_model('hf-hub:somebody/other')


def test_models_do_not_keep_the_path_of_the_cache(hub: HubDouble, weights: bytes, tmp_path: Path):
    features = {'features_only': True}
    for kwargs in ({}, features, features | {'feature_cls': 'getter'}, features | {'feature_cls': 'hook'}):
        model = create_model(TWIN, pretrained=True, **kwargs)
        for module in model.modules():
            assert str(tmp_path) not in f'{getattr(module, "pretrained_cfg", "")}{getattr(module, "default_cfg", "")}'
        assert model.pretrained_cfg['hf_hub_id'] == PLAIN


def test_a_repository_of_pickles(hub: HubDouble):
    hub.add_repo(PLAIN, {'pytorch_model.bin': b'never read'})
    error = _create()
    assert error is not None
    assert 'no public repository with these files' in error.sources[1]
