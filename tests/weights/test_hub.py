"""The way to the Hub and back, through the real client over HTTP."""
import shutil
from pathlib import Path

import pytest
import timm
from helpers.hub_double import HubDouble, point_client_to
from helpers.olah_mirror import olah_mirror, olah_python
from huggingface_hub import constants
from safetensors.torch import load_file

from timm_eca.commands.main import main
from timm_eca.conversion.convert import convert
from timm_eca.weights.hub import point_to_repository
from timm_eca.weights.store import WeightsNotFoundError

REPO = 'timm-eca/eca_resnet18.bangguwu_in1k'
FILES = {'README.md', 'config.json', 'model.safetensors'}


@pytest.fixture(scope='module')
def converted(resnet18_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(resnet18_file, tmp_path_factory.mktemp('converted') / 'folder').folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted folder of the test's own."""
    return Path(shutil.copytree(converted, tmp_path / 'folder'))


def test_push_is_one_commit_of_three_files(
        hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['push', str(folder), REPO, '--private']) == 0
    repo = hub.repos[REPO]
    assert repo.private
    commits = repo.log()
    assert len(commits) == 2  # the Hub's own, which makes the repository, and ours
    pushed = {name: content for name, content in commits[0].files.items() if name != '.gitattributes'}
    assert pushed == {name: point_to_repository((folder / name).read_bytes(), REPO) for name in FILES}
    assert 'model.safetensors' in commits[0].lfs
    output = ''.join(capsys.readouterr())
    assert commits[0].sha in output
    assert hub.token not in output

    assert main(['push', str(folder), REPO]) == 0  # again: nothing new
    assert len(repo.log()) == 2
    assert 'no commit made' in capsys.readouterr().out

    (folder / 'README.md').write_text((folder / 'README.md').read_text() + '\nMore.\n')
    assert main(['push', str(folder), REPO]) == 0
    assert len(repo.log()) == 3
    assert repo.head().files['README.md'] == point_to_repository((folder / 'README.md').read_bytes(), REPO)
    assert set(repo.head().files) - {'.gitattributes'} == FILES  # no pickle


def test_convert_and_push_at_once(hub: HubDouble, resnet18_file: Path):
    assert main(['convert', str(resnet18_file), '--push-to-hub', REPO]) == 0
    assert set(hub.repos[REPO].head().files) > FILES


def test_pull_request_and_branch(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    hub.add_repo(REPO, {'README.md': b'old'})
    before = hub.repos[REPO].head()
    assert main(['push', str(folder), REPO, '--create-pr']) == 0
    assert 'discussions/1' in capsys.readouterr().out
    assert main(['push', str(folder), REPO, '--revision', 'v2']) == 0
    assert hub.repos[REPO].head() == before
    for revision in ('refs/pr/1', 'v2'):
        assert set(hub.repos[REPO].head(revision).files) >= FILES


def test_dry_run_sends_nothing(hub: HubDouble, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['push', str(folder), REPO, '--dry-run']) == 0
    assert hub.requests == []
    output = capsys.readouterr().out
    assert all(name in output for name in FILES)


@pytest.mark.parametrize(('change', 'sentence'), [
    ('wrong token', 'hf auth login'),
    ('no token', 'hf auth login'),
    ('forbidden', 'write access'),
    ('bad name', 'ORGANISATION/NAME'),
    ('missing file', 'has no config.json'),
    ('cut off weights', 'not a whole safetensors file'),
    ('broken config', 'not the config of a model'),
    ('broken card', 'README.md'),
    ('missing folder', 'has no model.safetensors'),
    ('offline', 'HF_HUB_OFFLINE'),
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
    if change == 'wrong token':
        token = 'hf_wrong_token'
        monkeypatch.setenv('HF_TOKEN', token)
    elif change == 'no token':
        monkeypatch.delenv('HF_TOKEN')
    elif change == 'forbidden':
        hub.add_repo(REPO, {'README.md': b'old'})
        hub.fault = lambda method, path: (403, {}, b'{"error": "Forbidden"}') if method == 'POST' else None
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
    assert all(set(repo.head().files) <= {'.gitattributes', 'README.md'} for repo in hub.repos.values())


def _expect_weights(folder: Path, *names: str) -> None:
    """Loads models of these names, whose weights must be those of a folder."""
    wanted = load_file(folder / 'model.safetensors')
    for name in names:
        for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
            model = timm.create_model(name, pretrained=True, **kwargs)
            loaded = {key: value for key, value in model.state_dict().items() if not key.startswith('fc.')}
            assert len(loaded) == 128
            assert all(value.equal(wanted[key]) for key, value in loaded.items()), name


@pytest.mark.slow
def test_download_from_a_hub_of_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """olah serves the folder from a git repository; timm loads it by the model's name, and by the repository's."""
    python = olah_python()
    if python is None:
        pytest.skip('olah is not installed')
    repos = {REPO: folder, 'somebody/eca_resnet18.bangguwu_in1k': folder}
    with olah_mirror(repos, tmp_path / 'olah') as url, monkeypatch.context() as patch:
        point_client_to(url, patch)
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        _expect_weights(folder, 'eca_resnet18', f'hf-hub:{REPO}')
        patch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'other'))
        patch.setenv('TIMM_ECA_HUB_ORG', 'somebody')
        _expect_weights(folder, 'eca_resnet18')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))  # it is filled now: no server is needed
    _expect_weights(folder, 'eca_resnet18', f'hf-hub:{REPO}')


def test_filled_cache_without_a_server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The layout of the Hub's cache, filled by hand."""
    repo = tmp_path / 'hub' / f'models--{REPO.replace("/", "--")}'
    snapshot = repo / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    for name in FILES:
        (snapshot / name).symlink_to(folder / name)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    _expect_weights(folder, 'eca_resnet18', f'hf-hub:{REPO}')


@pytest.mark.parametrize('status', [401, 403, 404])
def test_hub_without_the_weights(status: int, hub: HubDouble):
    """What a Hub answers is told in the one error."""
    hub.fault = lambda method, path: (status, {}, b'{"error": "no"}')
    with pytest.raises(WeightsNotFoundError, match=r'No weights for eca_resnet18\.bangguwu_in1k') as error:
        timm.create_model('eca_resnet18', pretrained=True)
    assert error.value.__suppress_context__
    assert hub.token not in str(error.value)


def test_registered_ids():
    assert timm.models.get_pretrained_cfg('eca_resnet18').hf_hub_id == REPO
