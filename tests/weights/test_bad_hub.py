"""A Hub that fails: at each request of a push or a download, in every way, once and for good."""
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.hub_double import HubDouble, Reply
from timm.models import create_model, save_for_hf

from timm_eca.analysis.predict import ModelError, load_model
from timm_eca.commands import process
from timm_eca.commands.main import main
from timm_eca.weights.hub import HubError, push_folder
from timm_eca.weights.store import WeightsNotFoundError

REPO = 'timm-eca/mine'
FILES = ('README.md', 'config.json', 'model.safetensors')
OLD = {name: f'the old {name}'.encode() for name in FILES}
JSON = {'Content-Type': 'application/json'}


def _raise(error: type[ConnectionError]) -> Reply:
    raise error


def _stall() -> Reply:
    threading.Event().wait(1)
    raise ConnectionError


FAULTS: dict[str, Callable[[], Reply]] = {
    'too many requests': lambda: (429, {'Retry-After': '3'}, b'slow down'),
    'internal error': lambda: (500, {}, b'oops'),
    'unavailable': lambda: (503, {}, b'<html>'),
    'forbidden': lambda: (403, {}, b''),
    'reset': lambda: _raise(ConnectionError),
    'reset after the deed': lambda: _raise(ConnectionAbortedError),
    'cut off': lambda: (200, {**JSON, 'Content-Length': '5000', 'Connection': 'close'}, b'{"url": "http'),
    'nothing': lambda: (200, {}, b''),
    'login page': lambda: (200, {'Content-Type': 'text/html'}, b'<html>Log in'),
    'other JSON': lambda: (200, JSON, b'{}'),
    'a list': lambda: (200, JSON, b'[]'),
    'redirect to nowhere': lambda: (302, {'Location': 'http://127.0.0.1:9/'}, b''),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_for_hf(create_model('eca_test_resnet', num_classes=3), tmp_path / 'folder', safe_serialization=True)
    (tmp_path / 'folder' / 'README.md').write_text('---\nlicense: mit\n---\nA card.')
    return tmp_path / 'folder'


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited for between its tries."""
    slept: list[float] = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    return slept


def _install(hub: HubDouble, fault: Callable[[], Reply], first: int, last: int) -> None:
    """Lets a Hub fail at its requests of these numbers, from now on."""
    count = iter(range(10 ** 6))

    def fail(method: str, path: str) -> Reply | None:
        return fault() if first <= next(count) < last else None
    hub.fault = fail


def _count_requests(hub: HubDouble, folder: Path) -> int:
    hub.add_repo(REPO, OLD)
    push_folder(folder, REPO)
    return len(hub.requests)


def _push_at_each_request(hub: HubDouble, folder: Path, fault: Callable[[], Reply]) -> Iterator[str]:
    """Pushes with a fault at each request, once and from there on. The sentences of the errors."""
    new = {name: (folder / name).read_bytes() for name in FILES}
    for first in range(_count_requests(hub, folder)):
        for last in (first + 1, 10 ** 6):
            repo = hub.add_repo(REPO, OLD)
            before = len(repo.log())
            _install(hub, fault, first, last)
            try:
                push_folder(folder, REPO)
                failed = False
            except HubError as e:
                yield str(e)
                failed = True
            hub.fault = None
            files = {name: repo.head().files[name] for name in FILES}
            assert files == new if not failed else files in (OLD, new)
            assert push_folder(folder, REPO).changed == (files == OLD)
            assert {name: repo.head().files[name] for name in FILES} == new
            assert len(repo.log()) == before + 1  # one commit, whatever was tried again


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_push_is_whole_or_absent(name: str, hub: HubDouble, folder: Path, slept: list[float]):
    sentences = list(_push_at_each_request(hub, folder, FAULTS[name]))
    assert sentences
    for sentence in sentences:
        assert sentence.isprintable()
        assert any(cure in sentence for cure in ('push again', 'write access', 'check the name'))
        assert hub.url in sentence
        assert hub.token not in sentence
        assert 'metadata' not in sentence
    assert sum(slept) < 60 * len(sentences)
    if name == 'too many requests' and slept:  # old clients give up at once
        assert 4 in slept  # as was asked for, and a second more


def test_stalls_end(
        hub: HubDouble,
        folder: Path,
        slept: list[float],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """The client alone waits for ever for an answer to these."""
    monkeypatch.setattr(process, 'SILENCE', 0.3)
    for first in (0, _count_requests(hub, folder) - 1):
        repo = hub.add_repo(REPO, OLD)
        _install(hub, _stall, first, first + 1)
        assert main(['push', str(folder), REPO]) == 2
        assert 'ReadTimeout' in capsys.readouterr().err
        assert repo.head().files['config.json'] == OLD['config.json']


def test_the_token_goes_nowhere_else(
        hub: HubDouble, folder: Path, slept: list[float], capfd: pytest.CaptureFixture[str]):
    with HubDouble() as other:
        for status in (302, 307):
            for first in (0, 3, 5, _count_requests(hub, folder) - 1):
                hub.add_repo(REPO, OLD)
                _install(hub, lambda status=status: (status, {'Location': f'{other.url}/x'}, b''), first, 10 ** 6)
                main(['push', str(folder), REPO])
                hub.fault = None
        assert len(other.requests) >= 6
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


# Downloads, of a warm start: a twin and the weights of the plain model.
TWIN, PLAIN = 'eca_test_resnet.r160_in1k', 'timm/test_resnet.r160_in1k'
LIE = bytearray()
DOWNLOADS = FAULTS | {
    'wrong content': lambda: (200, {}, b'rubbish'),
    'wrong content of the right length': lambda: (200, {}, LIE),
}


@pytest.fixture
def weights(hub: HubDouble, tmp_path: Path) -> None:
    save_for_hf(create_model('test_resnet'), tmp_path / 'plain', safe_serialization=True)
    content = {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()}
    hub.add_repo(PLAIN, content)
    LIE[:] = content['model.safetensors']
    LIE[-5] ^= 1


def _equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors = other.state_dict()
    return all(value.equal(tensors[key]) for key, value in model.state_dict().items())


def _create() -> str:
    """Creates the model, or the sentence of why it can't be had."""
    try:
        timm.create_model(TWIN, pretrained=True)
    except WeightsNotFoundError as e:
        return str(e)
    return ''


@pytest.mark.slow
@pytest.mark.parametrize('name', DOWNLOADS)
def test_download_is_whole_or_an_error(name: str, hub: HubDouble, weights: None, slept: list[float], tmp_path: Path):
    """At the first request and at the others; afterwards all is well, whatever is left in the cache."""
    wanted = timm.create_model(TWIN, pretrained=True)
    for first in range(len(hub.requests)):
        for last in (first + 1, 10 ** 6):
            os.rename(tmp_path / 'hub', tmp_path / f'hub{first}-{last}')
            _install(hub, DOWNLOADS[name], first, last)
            sentence = _create()
            assert all(line.isprintable() for line in sentence.splitlines())
            assert hub.token not in sentence
            if not sentence:
                assert _equal(timm.create_model(TWIN, pretrained=True), wanted)
            hub.fault = None
            _create()  # clients of before 1.1 go on after the rubbish that they have
            assert _equal(timm.create_model(TWIN, pretrained=True), wanted)


def test_a_stale_cache_and_errors_before_wrong_content(
        hub: HubDouble, weights: None, slept: list[float], tmp_path: Path):
    """What is in the cache is compared with its digest each time, whichever way it came there."""
    wanted = timm.create_model(TWIN, pretrained=True)
    repo = hub.repos[PLAIN]
    changed = dict(repo.head().files) | {'model.safetensors': bytes(LIE)}
    digest = hashlib.sha256(LIE).hexdigest()
    repo.objects[digest] = bytes(LIE)
    repo.add_commit('refs/heads/main', repo.head(), 'new weights', '', changed, {'model.safetensors': digest})
    assert not _equal(timm.create_model(TWIN, pretrained=True), wanted)  # they are those of the new commit

    blob = max((tmp_path / 'hub').rglob('blobs/' + digest))
    blob.write_bytes(blob.read_bytes()[:-3] + b'???')
    assert 'SHA-256' in _create()
    assert _create() == ''
    count = iter(range(100))
    os.rename(tmp_path / 'hub', tmp_path / 'away')
    lie = bytes(LIE[:-3]) + b'???'
    hub.fault = lambda method, path: (500, {}, b'') if next(count) < 7 else (200, {}, lie) if method == 'GET' else None
    assert _create()
    hub.fault = None
    assert _create() == ''


def test_models_of_repositories(hub: HubDouble, folder: Path, slept: list[float], tmp_path: Path):
    """As `predict` loads them: by any spelling, and only what the Hub announced."""
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo('somebody/safe', content)
    for name in ('hf-hub:somebody/safe', 'HF_hub:somebody/safe@main', f'local-dir:{folder}'):
        assert load_model(name).num_classes == 3
    bad = json.loads(content['config.json'])
    bad['model_args']['checkpoint_path'] = '/etc/passwd'
    hub.add_repo('somebody/bad', {**content, 'config.json': json.dumps(bad).encode()})
    (folder / 'config.json').write_text(json.dumps(bad))
    for name in ('hf-hub:somebody/bad', 'hf_hub:somebody/bad', f'LOCAL-DIR:{folder}'):
        with pytest.raises(ModelError, match='checkpoint_path'):
            load_model(name)
    os.rename(tmp_path / 'hub', tmp_path / 'away')
    lie = content['model.safetensors'][:-3] + b'???'
    hub.fault = lambda method, path: (200, {}, lie) if method == 'GET' and 'resolve' in path and 'safetensors' in path \
        else None
    with pytest.raises(HubError, match='SHA-256'):
        load_model('hf-hub:somebody/safe')


@pytest.mark.parametrize('kwargs', [
    {}, {'features_only': True}, {'features_only': True, 'feature_cls': 'getter'},
    {'features_only': True, 'feature_cls': 'hook'}, {'num_classes': 0},
])
def test_no_path_of_the_cache_is_kept(kwargs: dict[str, Any], hub: HubDouble, weights: None, tmp_path: Path):
    model = timm.create_model(TWIN, pretrained=True, **kwargs)
    for module in model.modules():
        assert str(tmp_path) not in str(getattr(module, 'pretrained_cfg', ''))
        assert str(tmp_path) not in str(getattr(module, 'default_cfg', ''))
    assert model.pretrained_cfg['hf_hub_id'] == PLAIN


def test_a_repository_of_pickles_only(hub: HubDouble, weights: None, tmp_path: Path):
    hub.add_repo(PLAIN, {'pytorch_model.bin': b'never read'})
    assert 'no public repository with model.safetensors' in _create()
