"""A Hub that fails in a push or a download."""
import hashlib
import threading
import time
from pathlib import Path

import pytest
from helpers.hub_double import PUSHED, HubDouble, Reply
from huggingface_hub import constants
from timm.models import create_model, save_for_hf

from timm_eca.commands import process
from timm_eca.commands.main import main
from timm_eca.conversion.pretrained import find_pretrained
from timm_eca.weights.hub import HubError, fetch_folder, push_folder
from timm_eca.weights.store import WeightsNotFoundError

REPO = 'timm-eca/mine'
FILES = ('README.md', 'config.json', 'model.safetensors')
OLD = {name: f'the old {name}'.encode() for name in FILES}
TWIN, PLAIN = 'eca_test_resnet.r160_in1k', 'timm/test_resnet.r160_in1k'  # a warm start and its weights
LOGIN_PAGE: Reply = (200, {'Content-Type': 'text/html'}, b'<html>Log in')


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client wanted to wait between its attempts."""
    slept: list[float] = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    return slept


def _raise(error: type[Exception]) -> Reply:
    raise error


@pytest.mark.parametrize(('change', 'sentence'), [
    ('wrong token', 'hf auth login'),
    ('no token', 'hf auth login'),
    ('forbidden', 'write access'),
    ('not implemented', "this server can't do that"),
    ('failed upload', '422 '),
    ('login page', 'login in the browser'),
    ('bad name', 'ORGANISATION/NAME'),
    ('missing file', 'has no config.json'),
    ('cut off weights', 'not a whole safetensors file'),
    ('broken card', 'correct the metadata at the top of README.md'),
    ('missing folder', 'has no model.safetensors'),
    ('offline', 'unset HF_HUB_OFFLINE'),
    ('no server', 'check the connection'),
])
def test_refused_push(
        change: str,
        sentence: str,
        hub: HubDouble,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """One sentence, exit status 2, no commit, and the token in no output and no file."""
    repo, token = REPO, hub.token
    replies = {
        'forbidden': (403, '/commit'), 'not implemented': (501, '/preupload'), 'failed upload': (422, '.git/double')}
    if change == 'wrong token':
        token = 'hf_' + 'wrong' * 7
        monkeypatch.setenv('HF_TOKEN', token)
    elif change == 'no token':
        monkeypatch.delenv('HF_TOKEN')
    elif change in replies:
        status, part = replies[change]
        hub.fault = lambda method, path: (status, {}, b'{"error": "no"}') if part in path else None
    elif change == 'login page':
        hub.fault = lambda method, path: LOGIN_PAGE
    elif change == 'bad name':
        repo = 'a/b/c'
    elif change == 'missing file':
        (folder / 'config.json').unlink()
    elif change == 'cut off weights':
        weights = folder / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == 'broken card':
        (folder / 'README.md').write_text('---\nlicense: [\n---\n')
    elif change == 'missing folder':
        folder = folder / 'nowhere'
    elif change == 'offline':
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    else:
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert main(['push', str(folder), repo]) == 2
    output = capsys.readouterr()
    assert sentence in output.err, output.err
    assert output.err.count('\n') == 1
    assert token not in output.out + output.err
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and token.encode() in path.read_bytes()]
    assert all(set(repo.head().files) == {'.gitattributes'} for repo in hub.repos.values())
    hub.requests.clear()  # the fixture takes a 501 for a mistake


@pytest.mark.parametrize('name', ['internal error', 'reset after the commit', 'web page'])
def test_push_is_whole_or_absent(name: str, hub: HubDouble, folder: Path, slept: list[float]):
    """With a fault at the commit."""
    faults = {
        'internal error': lambda: (500, {}, b'oops'), 'reset after the commit': lambda: _raise(ConnectionAbortedError),
        'web page': lambda: LOGIN_PAGE}
    repo = hub.add_repo(REPO, OLD)
    before = len(repo.log())
    hub.fault = lambda method, path: faults[name]() if '/commit/' in path else None
    with pytest.raises(HubError) as error:
        push_folder(folder, REPO)
    assert hub.url in str(error.value)
    assert hub.token not in str(error.value)
    old = {name: repo.head().files[name] for name in FILES}
    hub.fault = None
    push_folder(folder, REPO)
    new = {name: repo.head().files[name] for name in FILES}
    assert old in (OLD, new)
    assert new['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
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


@pytest.fixture
def weights(hub: HubDouble, tmp_path: Path) -> bytes:
    """Weights of a plain model on the Hub."""
    save_for_hf(create_model('test_resnet'), tmp_path / 'plain', safe_serialization=True)
    content = {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()}
    hub.add_repo(PLAIN, content)
    return content['model.safetensors']


def _expect_no_weights(name: str = TWIN) -> WeightsNotFoundError:
    with pytest.raises(WeightsNotFoundError) as error:
        create_model(name, pretrained=True)
    return error.value


@pytest.mark.parametrize(('name', 'why', 'fix'), [
    ('reset', 'RemoteProtocolError', 'check the connection'), ('unavailable', '503', 'check the connection'),
    ('not there', 'no public repository with these files', 'hf auth login'),
    ('not implemented', 'HTTP 501', 'HF_HUB_DISABLE_XET=1'), ('login page', 'FileMetadataError', ''),
])
def test_one_request(name: str, why: str, fix: str, hub: HubDouble, weights: bytes, slept: list[float]):
    """Without the weights in the cache, a warm start asks the Hub once, and never waits."""
    replies: dict[str, Reply] = {
        'unavailable': (503, {}, b''), 'not there': (404, {}, b''), 'not implemented': (501, {}, b''),
        'login page': LOGIN_PAGE}
    hub.fault = lambda method, path: replies[name] if name in replies else _raise(ConnectionError)
    error = _expect_no_weights()
    assert why in error.sources[1]
    assert fix in error.fixes[0]
    assert hub.token not in str(error)
    assert [request.method for request in hub.requests] == ['HEAD'] * (2 if name == 'login page' else 1)
    with pytest.raises(WeightsNotFoundError):  # the same for a model of timm's own
        find_pretrained('test_resnet.r160_in1k')
    assert slept == []
    hub.fault = None
    create_model(TWIN, pretrained=True)
    hub.requests.clear()  # the fixture takes a 501 for a mistake


@pytest.mark.parametrize('status', [404, 501])
def test_a_server_without_xet(
        status: int, hub: HubDouble, folder: Path, weights: bytes, slept: list[float], monkeypatch: pytest.MonkeyPatch):
    """It announces Xet, and refuses the request for its token."""
    pytest.importorskip('hf_xet')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    headers = {
        'X-Repo-Commit': '0' * 40, 'ETag': f'"{hashlib.sha256(weights).hexdigest()}"',
        'X-Linked-Size': str(len(weights)), 'X-Xet-Hash': '0' * 64,
        'X-Xet-Refresh-Route': f'{hub.url}/api/models/{PLAIN}/xet-read-token/main'}
    hub.fault = lambda method, path: (
        (200, headers, b'') if method == 'HEAD' else (status, {}, b'') if '/xet-' in path else None)
    error = _expect_no_weights()
    assert f'this server can\'t do that (HTTP {status})' in error.sources[1]
    assert 'HF_HUB_DISABLE_XET=1' in error.fixes[0]
    with pytest.raises(HubError, match='HF_HUB_DISABLE_XET=1'):
        push_folder(folder, REPO)
    hub.requests.clear()  # the fixture takes a 501 for a mistake


def test_downloads_are_hashed_once(hub: HubDouble, weights: bytes, slept: list[float], tmp_path: Path):
    """A download that differs from its digest is refused. A file in the cache is not read again for that."""
    lie = bytearray(weights)
    lie[-5] ^= 1
    hub.fault = lambda method, path: (200, {}, bytes(lie)) if method == 'GET' and 'safe' in path else None
    error = _expect_no_weights()
    assert 'the SHA-256 of model.safetensors differs from the Hub\'s' in error.sources[1]
    with pytest.raises(HubError, match='the SHA-256 of'):
        fetch_folder(f'hf-hub:{PLAIN}')
    hub.fault = None
    create_model(TWIN, pretrained=True)

    hub.repos[PLAIN].commit(PUSHED, {'model.safetensors': bytes(lie)})
    create_model(TWIN, pretrained=True)  # downloads the new weights
    [blob] = (tmp_path / 'hub').rglob(f'blobs/{hashlib.sha256(lie).hexdigest()}')
    blob.write_bytes(weights)
    create_model(TWIN, pretrained=True)
    blob.write_bytes(b'not whole')
    error = _expect_no_weights()
    assert 'SafetensorError' in error.sources[1]
    assert 'cache' in error.fixes[0]


def test_models_do_not_keep_the_path_of_the_cache(hub: HubDouble, weights: bytes, tmp_path: Path):
    features = {'features_only': True}
    for kwargs in ({}, features, features | {'feature_cls': 'getter'}, features | {'feature_cls': 'hook'}):
        model = create_model(TWIN, pretrained=True, **kwargs)
        for module in model.modules():
            assert str(tmp_path) not in f'{getattr(module, "pretrained_cfg", "")}{getattr(module, "default_cfg", "")}'
        assert model.pretrained_cfg['hf_hub_id'] == PLAIN


def test_a_repository_of_pickles(hub: HubDouble):
    hub.add_repo(PLAIN, {'pytorch_model.bin': b'never read'})
    assert 'no public repository with these files' in _expect_no_weights().sources[1]
