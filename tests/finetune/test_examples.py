"""The images that `timm-eca finetune` trains and validates on."""
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers.image_folders import FAST, draw, images, touch
from PIL import Image

from timm_eca.commands.main import main

pytest.importorskip('accelerate')
pytest.importorskip('sklearn')

from timm_eca.errors import TimmEcaError
from timm_eca.finetune.examples import split_sources
from timm_eca.images.batches import Checked, read_all
from timm_eca.images.sources import Sources, open_sources


def read(folder: Path, check: bool = True) -> Sources:
    sources = open_sources(str(folder))
    parts = [part for part in (sources.train, sources.val) if part is not None]
    return split_sources(sources, [read_all(part) if check else Checked({}, {}) for part in parts])


def test_the_same_image_on_both_sides_is_told(tmp_path: Path):
    touch(tmp_path, *images('train/a', 'train/b', 'val/a', 'val/b'))
    (tmp_path / 'val' / 'a' / '0.jpg').write_bytes(b'damaged')  # it has no pixels to compare
    with Image.open(tmp_path / 'train/a/1.png') as image:
        image.save(tmp_path / 'val/a/copy.bmp')
    _, note = read(tmp_path).notes
    assert note.startswith('1 of 9 validation images')
    assert f'{tmp_path}/val/a/copy.bmp is {tmp_path}/train/a/1.png' in note
    assert read(tmp_path, check=False).notes == ()
    shutil.rmtree(tmp_path / 'val')  # what is split off has one of each class
    assert read(tmp_path).notes == ()
    for name in '123':
        shutil.copy(tmp_path / 'train/a/0.png', tmp_path / f'train/a/{name}.png')
    [note] = read(tmp_path).notes
    assert note.startswith('1 of 2 validation images')


def test_files_that_cant_be_read_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    touch(tmp_path, *images('a', 'b'))
    heic = b'\0\0\0\x18ftypheic' + bytes(12)
    (tmp_path / 'a' / 'x.heic').write_bytes(heic)
    (tmp_path / 'a' / 'clip.mp4').write_bytes(b'video')
    Image.new('F', (8, 8)).save(tmp_path / 'b' / 'float.tif')
    Image.new('I;16', (8, 8)).save(tmp_path / 'b' / 'deep.png')
    data = read(tmp_path)
    assert len(data.train) + len(data.val) == 9
    [note] = data.notes
    assert note.startswith('3 of 12 images')
    assert all(word in note for word in ('clip.mp4', 'x.heic', 'pip install pillow-heif', 'float.tif', '32 bits'))
    for path in (tmp_path / 'a').glob('*.*'):
        path.unlink()
    for name in '123':
        (tmp_path / 'a' / f'{name}.HEIC').write_bytes(heic)
    with pytest.raises(TimmEcaError, match=r'class \'a\' that can be read \(.*1.HEIC: .*pip install pillow-heif'):
        read(tmp_path)


def test_bad_files_change_neither_the_split_nor_the_fingerprint(tmp_path: Path):
    touch(tmp_path, *images('a', 'b', count=10))
    whole, before = read(tmp_path), open_sources(str(tmp_path)).fingerprint
    assert (len(whole.train), len(whole.val)) == (16, 4)
    bad = Path(whole.train.files[0])
    bad.write_bytes(b'')
    checked, listed = read(tmp_path), read(tmp_path, check=False)
    assert checked.val.files == listed.val.files == whole.val.files
    assert checked.train.files == whole.train.files[1:]
    assert listed.train.files == whole.train.files
    assert open_sources(str(tmp_path)).fingerprint == before
    bad.rename(bad.with_name('other.png'))
    assert open_sources(str(tmp_path)).fingerprint != before


def test_a_run_without_the_check(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    """The next image replaces a bad one in training. In validation a bad one does not count."""
    bad = [draw(tmp_path / 'data' / split, {'red': 4, 'green': 4}) / 'red' / '0.png' for split in ('train', 'val')]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    command = ['finetune', str(tmp_path / 'data'), *FAST, '--epochs', '1', '--no-check-images', '--output']
    assert main([*command, str(tmp_path / 'out')]) == 0
    assert '8 images to train on, 8 to validate on' in capsys.readouterr().out
    assert {path for path in bad if f'Skipped {path}' in caplog.text} == set(bad)
    assert '% on 7 validation images' in (tmp_path / 'out' / 'README.md').read_text()

    for path in (tmp_path / 'data' / 'train').rglob('*.png'):
        path.write_bytes(b'')
    assert main([*command, str(tmp_path / 'none')]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'None of 8 images can be read' in error
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('kind', 'words'), [
    ('empty', 'no images in folders'), ('one class', 'one class only'), ('one image', 'can\'t be split by class'),
    ('corrupt class', 'no image to train on of the class'), ('corrupt', 'no image'), ('a file', 'not a folder'),
    ('corrupt val', 'no image to validate on'),
])
def test_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: str):
    folder = tmp_path / 'fruit'
    touch(folder, *images('red', *(['green'] if kind != 'one class' else [])))
    if kind in ('empty', 'a file'):
        shutil.rmtree(folder)
        folder.mkdir() if kind == 'empty' else folder.touch()
    elif kind == 'one image':
        for path in images('red')[1:]:
            (folder / path).unlink()
    elif kind == 'corrupt val':
        shutil.copytree(folder, folder / 'train')
        for name in ('red', 'green'):
            (folder / name).rename(folder / 'train' / f'{name}2')
        touch(folder, 'val/red/1.png')
        (folder / 'val/red/1.png').write_bytes(b'')
    elif kind.startswith('corrupt'):
        for path in folder.rglob('*.png'):
            path.write_bytes(b'' if kind == 'corrupt' or path.parent.name == 'red' else path.read_bytes())
    assert main(['finetune', str(folder), *FAST, '--output', str(tmp_path / 'out')]) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert re.fullmatch(rf'timm-eca: .*fruit.*{words}.*\n', captured.err)
    assert not (tmp_path / 'out').exists()


def test_a_class_without_validation_images_is_told(tmp_path: Path):
    touch(tmp_path, *images('train/a', 'train/b', 'val/b'))
    assert read(tmp_path).notes == ('1 of 2 classes have no images to validate on: a.',)
