"""All published models at once: converted, pushed, and put into a collection."""
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.drive_double import QUOTA_PAGE, DriveDouble, drive_double
from helpers.hub_double import HubDouble
from helpers.official_files import official_state_dict, save_official

from timm_eca.commands import convert
from timm_eca.commands.main import main
from timm_eca.conversion import download
from timm_eca.weights.official import OFFICIAL

MODELS = ('eca_mobilenetv2', 'eca_resnet18')
REPOS = [f'my-lab/{model}.bangguwu_in1k' for model in MODELS]
FILES = {'README.md', 'config.json', 'model.safetensors'}


@pytest.fixture
def drive(
        hub: HubDouble, mobilenetv2_file: Path, resnet18_file: Path, monkeypatch: pytest.MonkeyPatch,
) -> Iterator[DriveDouble]:
    """A Drive with the two smallest of the authors' files. There are no other models here."""
    hub.orgs = ('my-lab',)
    monkeypatch.setattr(convert, 'OFFICIAL', {model: OFFICIAL[model] for model in MODELS})
    with drive_double() as double:
        for model, file in zip(MODELS, (mobilenetv2_file, resnet18_file)):
            double.files[OFFICIAL[model].drive_id] = file
        monkeypatch.setattr(download, 'DRIVE_URL', double.url)
        yield double


def _commits(hub: HubDouble) -> dict[str, int]:
    """The number of commits in each repository, without the Hub's own first one."""
    return {name: len(repo.log()) - 1 for name, repo in hub.repos.items()}


def _items(hub: HubDouble) -> list[str]:
    [collection] = hub.collections.values()
    return [item['id'] for item in collection['items']]


def test_one_command_publishes_all(
        drive: DriveDouble, hub: HubDouble, home: Path, mobilenetv2_file: Path, capsys: pytest.CaptureFixture[str]):
    """First said, then stopped by Drive, then by the Hub, then done. Nothing is done twice."""
    command = ['convert', '--all', str(mobilenetv2_file), '--official', '--push-to-hub', 'my-lab']
    assert main([*command, '--dry-run']) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in (*REPOS, OFFICIAL['eca_resnet18'].url, 'downloaded', 'collection'))
    assert not home.exists()
    assert (hub.requests, drive.asked) == ([], [])

    drive.reply = QUOTA_PAGE
    assert main(command) == 2
    assert OFFICIAL['eca_resnet18'].url in capsys.readouterr().err
    assert _commits(hub) == {REPOS[0]: 1}
    assert _items(hub) == REPOS[:1]
    drive.reply = None
    before = (home / 'eca_mobilenetv2.bangguwu_in1k').stat().st_mtime_ns
    hub.fault = lambda method, path: (403, {}, b'{}') if 'collections' in path and method == 'POST' else None
    assert main(command) == 2
    assert 'the collection' in capsys.readouterr().err
    hub.fault = None
    assert main(command) == 0
    [slug] = hub.collections
    assert f'{hub.url}/collections/{slug}' in capsys.readouterr().out
    assert (home / 'eca_mobilenetv2.bangguwu_in1k').stat().st_mtime_ns == before
    assert all({path.name for path in (home / repo.partition('/')[2]).iterdir()} == FILES for repo in REPOS)
    assert _items(hub) == REPOS

    sent = len(hub.called('PUT'))
    assert main(command) == 0
    assert 'no commit made' in capsys.readouterr().out
    assert _commits(hub) == dict.fromkeys(REPOS, 1)
    assert all(set(repo.head().files) > FILES for repo in hub.repos.values())
    assert len(hub.called('PUT')) == sent
    assert len(hub.collections) == 1
    assert drive.asked == [OFFICIAL['eca_resnet18'].drive_id] * 2


@pytest.mark.parametrize(('change', 'words'), [
    ('another file', '--force'), ('another network', 'not a checkpoint that the authors published'),
    ('twice', 'are both of eca_mobilenetv2'), ('organisation', 'ORGANISATION'),
])
def test_nothing_is_begun_with_wrong_files(
        change: str,
        words: str,
        drive: DriveDouble,
        hub: HubDouble,
        home: Path,
        checkpoint: Path,
        mobilenetv2_file: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
):
    other = tmp_path / 'other.pth.tar'
    arguments = ['--all', str(mobilenetv2_file), str(other), '--official']
    if change == 'another network':
        arguments[2] = str(checkpoint)
    elif change == 'organisation':
        arguments = ['--all', '--push-to-hub', 'my lab']
    else:
        save_official(other, official_state_dict('eca_mobilenetv2'), epoch=101)
    if change == 'another file':
        assert main(['convert', str(other), '--official']) == 0
        arguments = ['--all', str(mobilenetv2_file), '--official']
    before = {path: path.stat().st_mtime_ns for path in home.rglob('*')}
    capsys.readouterr()
    assert main(['convert', *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in home.rglob('*')} == before
    assert (hub.requests, drive.asked) == ([], [])
