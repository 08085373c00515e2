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
from timm.models import create_model

from timm_eca.commands.main import main
from timm_eca.weights.hub import HubError, fetch_and_check, fetch_folder, point_to_repository, push_folder
from timm_eca.weights.model_folder import REPORT_FILES

REPO = 'timm-eca/mine'
FILES = {'README.md', 'config.json', 'model.safetensors'}


def _pushed(hub: HubDouble, revision: str = 'main') -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[REPO].head(revision).files.items() if name != '.gitattributes'}


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_is_one_commit(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['push', str(folder), REPO, '--private']) == 0
    repo, local = hub.repos[REPO], _content(folder)
    assert repo.private
    assert len(repo.log()) == 2  # the Hub's own, and ours
    assert _pushed(hub) == {**local, 'README.md': point_to_repository(local['README.md'], REPO)}
    assert f"'hf-hub:{REPO}'" in _pushed(hub)['README.md'].decode()
    output = ''.join(capsys.readouterr())
    assert repo.head().sha in output
    assert hub.token not in output

    assert main(['push', str(folder), REPO]) == 0  # again: nothing new
    assert len(repo.log()) == 2
    assert 'no commit made' in capsys.readouterr().out

    for name in ('README.md', *REPORT_FILES):
        (folder / name).write_text('Another text.')
    assert main(['push', str(folder), REPO]) == 0
    assert len(repo.log()) == 3
    assert _pushed(hub) == _content(folder)


def test_help_names_all_files(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(['push', '--help'])
    printed = capsys.readouterr().out
    assert [name for name in (*FILES, *REPORT_FILES) if name not in printed] == []


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
    hub.repos[REPO].commit('Add notes', {'notes.md': b'Edits of other files do not matter.'})
    config = json.loads((folder / 'config.json').read_text())
    for change, stays in (('first', False), ('second', True)):
        if stays:
            hub.repos[REPO].commit('Update README.md', {'README.md': b'Edited.'})
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
    assert "can't look at the repository (no public repository" in printed
    hub.add_repo(REPO, {'README.md': b'old'})
    assert main(command) == 0
    assert {request.path.rpartition('/')[2] for request in hub.called('POST')} == {'main'}  # only paths-info
    assert len(hub.repos[REPO].log()) == 2
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert main(command) == 0
    assert "can't look at the repository" in capsys.readouterr().out


@pytest.mark.parametrize('error', [TypeError('ours'), ValueError('ours'), RuntimeError('ours')])
def test_our_own_mistakes_are_tracebacks(
        error: Exception, hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, 'create_commit', fail)
    with pytest.raises(type(error), match='ours'):
        push_folder(folder, REPO)


def test_download(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add_repo(REPO, _content(folder))
    found = fetch_folder(f'hf-hub:{REPO}')
    assert _content(found) == {name: data for name, data in _content(folder).items() if name != 'README.md'}
    assert fetch_folder(f'HF_hub:{REPO}@main') == found
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


@pytest.mark.slow
def test_download_from_a_hub_of_others(resnet18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """olah serves the folder from a git repository; timm loads it by the model's name, and by the repository's.

    Afterwards the Hub's cache is filled, and no server is needed.
    """
    if olah_python() is None:
        pytest.skip('olah is not installed')
    folder = tmp_path / 'folder'
    assert main(['convert', str(resnet18_file), '--output', str(folder)]) == 0
    wanted, repo = load_file(folder / 'model.safetensors'), 'timm-eca/eca_resnet18.bangguwu_in1k'

    def expect_weights(*names: str) -> None:
        for name in names:
            loaded = create_model(name, pretrained=True).state_dict()
            assert loaded.keys() == wanted.keys()
            assert all(value.equal(wanted[key]) for key, value in loaded.items()), name

    repos = {repo: folder, repo.replace('timm-eca', 'somebody'): folder}
    with olah_mirror(repos, tmp_path / 'olah') as url, monkeypatch.context() as patch:
        point_client_to(url, patch)
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        expect_weights('eca_resnet18', f'hf-hub:{repo}')
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'other'))
        patch.setenv('TIMM_ECA_HUB_ORG', 'somebody')
        expect_weights('eca_resnet18')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    expect_weights('eca_resnet18', f'hf-hub:{repo}')
