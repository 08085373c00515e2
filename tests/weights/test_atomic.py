"""Folders and files are written whole or not at all, and others beside them stay."""
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.forked import fork, wait
from safetensors.torch import load_file, save_file

from timm_eca.weights.atomic import atomic_write, new_folder
from timm_eca.weights.digests import make_metadata, save_weights

FILES = {'a', 'b'}


def _write(place: Path, text: str, replace: bool = False) -> None:
    with new_folder(place, replace, FILES) as new:
        (new / 'a').write_text(text)


def _tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_folder_is_made_and_replaced(tmp_path: Path):
    place = tmp_path / 'below' / 'out'
    _write(place, 'first')
    with pytest.raises(FileExistsError, match='out exists'):
        _write(place, 'second')
    _write(place, 'third', replace=True)
    assert _tree(tmp_path) == {'below/out/a': 'third'}
    (place / 'mine').write_text('')
    with pytest.raises(FileExistsError, match="other files than a converted folder, 'mine'"):
        _write(place, 'fourth', replace=True)
    (tmp_path / 'file').write_text('')
    (tmp_path / 'link').symlink_to(place)
    for name in ('file', 'link'):
        with pytest.raises(FileExistsError, match=f'{name} is a link or a file, not a folder'):
            _write(tmp_path / name, 'fifth', replace=True)
    with pytest.raises(FileExistsError, match='now exists'), new_folder(tmp_path / 'now', False, FILES):
        (tmp_path / 'now').mkdir()  # another process makes it meanwhile
    assert _tree(tmp_path) == {'below/out/a': 'third', 'below/out/mine': '', 'file': ''}


@pytest.mark.parametrize('there', [False, True])
def test_an_exception_leaves_all_as_it_was(there: bool, tmp_path: Path):
    place = tmp_path / 'below' / 'out'
    if there:
        _write(place, 'first')
    with pytest.raises(KeyboardInterrupt), new_folder(place, True, FILES) as new:  # noqa: PT012
        (new / 'a').write_text('second')
        raise KeyboardInterrupt
    assert _tree(tmp_path) == ({'below/out/a': 'first'} if there else {})
    assert (tmp_path / 'below').exists() == there


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path / 'out', 'first')
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == '.new':
            raise OSError('no')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises(OSError, match='no'):
        _write(tmp_path / 'out', 'second', replace=True)
    assert _tree(tmp_path) == {'out/a': 'first'}


def test_folders_of_others_stay(tmp_path: Path):
    """Even those with names like ours."""
    for name in ('.out.timm_eca-backup.old', '.out.timm_eca-12345678.new', 'out.old', '.out.old'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'kept').write_text('mine')
    _write(tmp_path / 'out', 'first')
    before = _tree(tmp_path)
    _write(tmp_path / 'out', 'second', replace=True)
    atomic_write(tmp_path / 'out.new', lambda new: new.write_text('third'))
    assert _tree(tmp_path) == {**before, 'out/a': 'second', 'out.new': 'third'}


def test_a_process_that_dies_loses_nothing(tmp_path: Path):
    """Not even between the two renames; and the next one writes."""
    place = tmp_path / 'out'
    _write(place, 'first')

    def die() -> int:
        Path.rename = lambda self, target: os._exit(9) if self.suffix == '.new' else os.rename(self, target)
        _write(place, 'second', replace=True)
        return 0

    assert wait(fork(die)) == 9
    assert sorted(_tree(tmp_path).values()) == ['first', 'second']
    _write(place, 'third', replace=True)
    assert _tree(place) == {'a': 'third'}


def test_a_file_is_whole_or_as_before(tmp_path: Path):
    path = tmp_path / 'table.csv'

    def fail(new: Path) -> None:
        assert new.suffix == '.csv'
        new.write_text('half')
        raise OSError('full')

    atomic_write(path, lambda new: new.write_text('first'))
    with pytest.raises(OSError, match='full'):
        atomic_write(path, fail)
    assert _tree(tmp_path) == {'table.csv': 'first'}


def test_modes_are_those_of_the_umask(umask: None, tmp_path: Path):
    """Of weights in place of others, too: safetensors and `save_for_hf` give theirs mode 0600."""
    def write(path: Path) -> None:
        save_file({'x': torch.zeros(2)}, path)
        save_weights({'x': torch.ones(2)}, path, make_metadata({}))

    with new_folder(tmp_path / 'out', False, FILES) as new:
        write(new / 'a')
        (new / 'b').write_text('')
    atomic_write(tmp_path / 'out' / 'c', write)
    assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o750
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / 'out').iterdir()} == {'0o640'}
    assert load_file(tmp_path / 'out' / 'a')['x'].equal(torch.ones(2))
