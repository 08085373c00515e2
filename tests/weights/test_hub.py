"""Uploads and downloads through the real client over HTTP."""
import json
import logging
import shutil
from pathlib import Path

import pytest
from helpers.hub_double import HubDouble, point_client_to
from helpers.olah_mirror import olah_mirror, olah_python
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from timm.models import create_model, get_pretrained_cfg, save_for_hf

from timm_eca.commands.main import main
from timm_eca.weights.hub import HubError, fetch_and_check, fetch_folder, point_to_repository, push_folder
from timm_eca.weights.model_folder import REPORT_FILES
from timm_eca.weights.store import WeightsNotFoundError

REPO = 'timm-eca/eca_resnet18.bangguwu_in1k'
FILES = {'README.md', 'config.json', 'model.safetensors'}


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('saved') / 'folder'
    save_for_hf(create_model('eca_test_resnet', num_classes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_text("---\nlicense: mit\n---\ntimm.create_model('local-dir:.')\n")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(saved, tmp_path / 'folder'))


def _pushed(hub: HubDouble, revision: str = 'main') -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[REPO].head(revision).files.items() if name != '.gitattributes'}


def test_push_is_one_commit(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['push', str(folder), REPO, '--private']) == 0
    repo = hub.repos[REPO]
    assert repo.private
    assert len(repo.log()) == 2  # the Hub's own, and ours
    assert _pushed(hub) == {name: point_to_repository((folder / name).read_bytes(), REPO) for name in FILES}
    assert f"'hf-hub:{REPO}'" in _pushed(hub)['README.md'].decode()
    assert 'model.safetensors' in repo.head().lfs
    output = ''.join(capsys.readouterr())
    assert repo.head().sha in output
    assert hub.token not in output

    assert main(['push', str(folder), REPO]) == 0  # again: nothing new
    assert len(repo.log()) == 2
    assert 'no commit made' in capsys.readouterr().out

    (folder / 'README.md').write_text('---\nlicense: mit\n---\nAnother card.')
    for name in REPORT_FILES:
        (folder / name).write_text('A report.')
    assert main(['push', str(folder), REPO]) == 0
    assert len(repo.log()) == 3
    assert _pushed(hub)['README.md'] == (folder / 'README.md').read_bytes()
    assert set(_pushed(hub)) == FILES | set(REPORT_FILES)


def test_help_names_all_files(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(['push', '--help'])
    printed = capsys.readouterr().out
    assert [name for name in (*FILES, *REPORT_FILES) if name not in printed] == []


def test_convert_and_push_at_once(hub: HubDouble, checkpoint: Path, tmp_path: Path):
    assert main(['convert', str(checkpoint), '--output', str(tmp_path / 'new'), '--push-to-hub', REPO]) == 0
    assert set(_pushed(hub)) == FILES


def test_pull_request_and_branch(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    before = hub.add_repo(REPO, {'README.md': b'old'}).head()
    assert main(['push', str(folder), REPO, '--create-pr']) == 0
    assert 'discussions/1' in capsys.readouterr().out
    assert main(['push', str(folder), REPO, '--revision', 'v2']) == 0
    assert hub.repos[REPO].head() == before
    for revision in ('refs/pr/1', 'v2'):
        assert set(_pushed(hub, revision)) == FILES


def test_an_edited_card_stays(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    """An edit on the Hub is kept, and told, until the user wants to replace it."""
    push = ['push', str(folder), REPO]
    main(push)
    hub.repos[REPO].edit('notes.md', b'Edits of other files do not matter.')
    config = json.loads((folder / 'config.json').read_text())
    for change, stays in (('first', False), ('second', True)):
        if stays:
            hub.repos[REPO].edit('README.md', b'Edited.', 'Update README.md')
        (folder / 'README.md').write_text(f'The {change} card.')
        (folder / 'config.json').write_text(json.dumps({**config, 'change': change}))
        for options in (['--dry-run'], []):
            capsys.readouterr()
            assert main([*push, *options]) == 0
            assert ('--replace-card' in capsys.readouterr().out) == stays
        assert json.loads(_pushed(hub)['config.json'])['change'] == change
        assert _pushed(hub)['README.md'] == (b'Edited.' if stays else b'The first card.')
    assert main(push) == 0  # still, when only our commits came after it
    assert _pushed(hub)['README.md'] == b'Edited.'
    assert main([*push, '--replace-card']) == 0
    assert _pushed(hub)['README.md'] == b'The second card.'


def test_nothing_private_goes_to_a_public_repository(
        hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    hub.ignores_private = True
    for options in ([], ['--dry-run'], ['--create-pr'], ['--revision', 'v2']):
        assert main(['push', str(folder), REPO, '--private', *options]) == 2
        assert 'is public, so nothing was uploaded' in capsys.readouterr().err
    assert _pushed(hub) == {}
    assert hub.called('PUT') == hub.called('POST', '/commit/') == []
    assert main(['push', str(folder), REPO]) == 0


def test_dry_run_writes_nothing(
        hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = ['push', str(folder), REPO, '--dry-run']
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in FILES)
    assert 'the repository or branch is new' in printed
    hub.add_repo(REPO, {'README.md': b'old'})
    assert main(command) == 0
    assert main([*command, '--revision', 'v2']) == 0
    assert {request.path.rpartition('/')[2] for request in hub.called('POST')} == {'main'}  # only paths-info
    assert len(hub.repos[REPO].log()) == 2
    capsys.readouterr()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert main(command) == 0
    assert "can't look at the repository" in capsys.readouterr().out


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
    ('broken config', 'not the config of a model'),
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
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
):
    """One sentence, exit status 2, no token in it, and no commit."""
    repo = REPO
    token = hub.token
    replies = {
        'forbidden': (403, '/commit'), 'not implemented': (501, '/preupload'), 'failed upload': (422, '.git/double')}
    if change == 'wrong token':
        token = 'hf_wrong_token'
        monkeypatch.setenv('HF_TOKEN', token)
    elif change == 'no token':
        monkeypatch.delenv('HF_TOKEN')
    elif change in replies:
        status, part = replies[change]
        hub.fault = lambda method, path: (status, {}, b'{"error": "no"}') if part in path else None
    elif change == 'login page':
        hub.fault = lambda method, path: (200, {'Content-Type': 'text/html'}, b'<html>Log in')
    elif change == 'bad name':
        repo = 'a/b/c'
    elif change == 'missing file':
        (folder / 'config.json').unlink()
    elif change == 'cut off weights':
        weights = folder / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == 'broken config':
        (folder / 'config.json').write_text('{')
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
    assert output.err.strip().count('\n') == 0
    assert token not in output.out + output.err
    assert all(set(repo.head().files) == {'.gitattributes'} for repo in hub.repos.values())
    for request in hub.requests:
        request.status = 0  # a 501 was wanted here


@pytest.mark.parametrize('status', [404, 501])
def test_a_server_without_xet(status: int, hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip('hf_xet')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    hub.fault = lambda method, path: (status, {}, b'') if 'xet' in path else None
    with pytest.raises(HubError, match='HF_HUB_DISABLE_XET=1'):
        push_folder(folder, REPO)
    assert [request.status for request in hub.called('GET', 'xet-write-token')] == [status]
    hub.requests.clear()


@pytest.mark.parametrize('error', [TypeError('ours'), ValueError('ours'), RuntimeError('ours')])
def test_our_own_mistakes_are_tracebacks(
        error: Exception, hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, 'create_commit', fail)
    with pytest.raises(type(error), match='ours'):
        main(['push', str(folder), REPO])


def test_download(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add_repo(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    found = fetch_folder(f'hf-hub:{REPO}')
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()}
    for name, sentence in (
            ('hf-hub:a/b', 'check the name'), ('hf-hub:a/b/c', 'ORGANISATION/NAME'),
            (f'hf-hub:{REPO}@v9', 'check the name'), ('nowhere', 'is not a folder'), ('a/b', 'see timm-eca list'),
    ):
        with pytest.raises(HubError, match=sentence):
            fetch_folder(name)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert fetch_folder(f'hf-hub:{REPO}') == found
    with pytest.raises(HubError, match='unset HF_HUB_OFFLINE'):
        fetch_folder('hf-hub:a/b')


def test_a_registered_name_goes_before_a_folder(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.chdir(tmp_path)
    for name in ('eca_test_resnet', 'eca_resnet18.bangguwu_in1k'):
        shutil.copytree(folder, name)
        with caplog.at_level(logging.WARNING):
            assert fetch_and_check(name) == name
        assert f'use ./{name}' in caplog.text
        assert fetch_and_check(f'./{name}') == f'local-dir:{name}'
    folder.rename('eca_test_resnet.mine')
    assert fetch_and_check('eca_test_resnet.mine') == 'local-dir:eca_test_resnet.mine'


@pytest.fixture(scope='module')
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a registered repository."""
    folder = tmp_path_factory.mktemp('full')
    save_for_hf(create_model('eca_resnet18'), folder, safe_serialization=True)
    (folder / 'README.md').write_text('A card.')
    return folder


def _expect_weights(folder: Path, *names: str) -> None:
    """Checks that the models of these names have the weights of a folder."""
    wanted = load_file(folder / 'model.safetensors')
    for name in names:
        loaded = create_model(name, pretrained=True).state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(value.equal(wanted[key]) for key, value in loaded.items()), name


@pytest.mark.slow
def test_download_from_a_hub_of_others(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """olah serves the folder from a git repository; timm loads it by the model's name, and by the repository's."""
    python = olah_python()
    if python is None:
        pytest.skip('olah is not installed')
    repos = {REPO: full, 'somebody/eca_resnet18.bangguwu_in1k': full}
    with olah_mirror(repos, tmp_path / 'olah') as url, monkeypatch.context() as patch:
        point_client_to(url, patch)
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        _expect_weights(full, 'eca_resnet18', f'hf-hub:{REPO}')
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'other'))
        patch.setenv('TIMM_ECA_HUB_ORG', 'somebody')
        _expect_weights(full, 'eca_resnet18')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))  # it is filled now: no server is needed
    _expect_weights(full, 'eca_resnet18', f'hf-hub:{REPO}')


def test_filled_cache_without_a_server(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The layout of the Hub's cache, filled by hand."""
    repo = tmp_path / 'hub' / f'models--{REPO.replace("/", "--")}'
    snapshot = repo / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    for name in FILES:
        (snapshot / name).symlink_to(full / name)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    _expect_weights(full, 'eca_resnet18', f'hf-hub:{REPO}')


def test_hub_without_the_weights(hub: HubDouble):
    with pytest.raises(WeightsNotFoundError, match=r'No weights for eca_resnet18\.bangguwu_in1k') as error:
        create_model('eca_resnet18', pretrained=True)
    assert hub.token not in str(error.value)
    assert get_pretrained_cfg('eca_resnet18').hf_hub_id == REPO
