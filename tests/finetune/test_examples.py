"""The examples that `timm-eca finetune` finds in folders as people have them. These tests draw the folders."""
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.image_folders import COLOURS, FAST, draw
from PIL import Image

from timm_eca.commands.main import main

pytest.importorskip('accelerate')
pytest.importorskip('sklearn')

from timm_eca.errors import TimmEcaError
from timm_eca.finetune.examples import Checked, list_all, read_all, split_sources
from timm_eca.images.sources import Sources, open_sources, open_split


def touch(root: Path, *names: str) -> Path:
    """Images of 8x8 pixels, no two alike; folders where a name ends with a slash."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('/'):
            path.mkdir()
        else:
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path, format='PNG')
    return root


def images(*folders: str, count: int = 4) -> list[str]:
    return [f'{folder}/{i}.png' for folder in folders for i in range(count)]


def read(folder: Path, check: Callable[[Any], Checked] = read_all, **options: Any) -> Sources:
    sources = open_sources(str(folder), **options)
    return split_sources(sources, [check(part) for part in (sources.train, sources.val) if part is not None])


def counts(data: Sources) -> tuple[tuple[str, ...], int, int]:
    return data.class_names, len(data.train), len(data.val)


@pytest.mark.parametrize('wrapper', ['', 'PlantVillage/', 'archive/Images/color/', 'x/train/', 'seg_train/seg_train/'])
def test_folders_around_the_classes(tmp_path: Path, wrapper: str):
    touch(tmp_path, *images(f'{wrapper}a', f'{wrapper}b'))
    data = read(tmp_path)
    assert counts(data) == (('a', 'b'), 6, 2)
    assert data.notes == []
    assert len(open_split(str(tmp_path)).train) == 8


@pytest.mark.parametrize(('train', 'val'), [
    ('train', 'val'), ('Training', 'Validation'), ('train_data', 'val_data'), ('trainset', 'valset'),
    ('train2', 'val2'), ('train_images', 'valid'), ('data/Train Set', 'data/dev'), ('x/seg_train/x', 'x/seg_val/y'),
])
def test_names_of_splits(tmp_path: Path, train: str, val: str):
    touch(tmp_path, *images(f'{train}/a', f'{train}/b'), *images(f'{val}/a', f'{val}/b', count=3))
    assert counts(read(tmp_path)) == (('a', 'b'), 8, 6)


@pytest.mark.parametrize(('train', 'test'), [
    ('train', 'test'), ('training_set', 'test_set'), ('trainset', 'testset'), ('Training', 'Testing'),
])
def test_a_test_split_is_used_where_it_is_named(tmp_path: Path, train: str, test: str):
    touch(tmp_path, *images(f'{train}/a', f'{train}/b'), *images(f'{test}/a', f'{test}/b', count=2))
    assert counts(read(tmp_path)) == (('a', 'b'), 6, 2)
    assert counts(read(tmp_path, val_split='test')) == (('a', 'b'), 8, 4)
    assert counts(read(tmp_path, train_split=test, val_split=train)) == (('a', 'b'), 4, 8)


@pytest.mark.parametrize(('names', 'words'), [
    (images('2023/cat', '2023/dog', '2024/cat', '2024/dog'), ('2023/{cat, dog}', '2024/{', '--train-split')),
    (images('cat/train', 'cat/val', 'dog/train', 'dog/val'), ('cat/{train, val}', 'like splits')),
    (images('train', 'test'), ('{test, train}', 'like splits')),
    (images('cat', 'cat/more', 'dog'), ('cat holds images and also folders of images',)),
    (images('train/a', 'training/a', 'train_2/a', 'Train/a'), ('Train, train', '--train-split')),
    (images('training_set/a', 'train_data/a'), ('train_data, training_set', '--train-split')),
    ([*images('a', 'b'), 'c/'], ('c has no images',)),
    (images('a'), ('one class only, \'a\'',)),
    (['1.png', '2.png'], ('no images in folders of their classes', '2 .png')),
    ([*images('a'), 'b/1.png'], ('can\'t be split by class', 'train and val')),
    (images('train/a', 'train/b', 'val/a', 'val/c'), ('1 classes that', '(c)')),
    ([*images('train/a', 'train/b'), 'val/a/'], ('val has no images',)),
    (images('train/a', 'train/b', 'val/x/a', 'val/y/a'), ('same name in several places',)),
    (images('A/x', 'A/y', 'B/A/x', 'B/A/y'), ('A/{x, y}', 'B/A/{x, y}')),
    (images('a', 'b\n'), ('not text',)),
])
def test_what_is_not_clear_is_refused(tmp_path: Path, names: Sequence[str], words: Sequence[str]):
    touch(tmp_path, *names)
    with pytest.raises(TimmEcaError) as caught:
        read(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value).count('\n') == 0


def test_a_place_is_named_by_its_option(tmp_path: Path):
    touch(tmp_path, *images('2023/cat', '2023/dog', '2024/cat', '2024/dog'))
    data = read(tmp_path, train_split='2023', val_split='2024')
    assert counts(data) == (('cat', 'dog'), 8, 8)
    assert {path for path, _ in data.train.dataset.samples} == {str(path) for path in tmp_path.glob('2023/*/*')}
    with pytest.raises(TimmEcaError, match=r'no folder 2025 .* 2023, 2024'):
        read(tmp_path, train_split='2025')


def test_innermost_folders_are_classes_and_it_is_said(tmp_path: Path):
    touch(tmp_path, *images('birds/owl', 'birds/hawk', 'cat', 'steam_train'), 'cover.png', 'cat/labels.npy')
    data = read(tmp_path)
    assert data.class_names == ('cat', 'hawk', 'owl', 'steam_train')
    assert any('birds/{hawk, owl}' in note for note in data.notes)
    assert any('cover.png' in note and '1 files are in no folder' in note for note in data.notes)


def test_classes_are_in_the_order_of_timm(tmp_path: Path):
    readers = pytest.importorskip('timm.data.readers.reader_image_folder')
    touch(tmp_path, *images('10', '9', 'B', 'a', 'x/n2', 'x/n10', count=5))
    _, index = readers.find_images_and_targets(str(tmp_path))
    assert list(read(tmp_path).class_names) == sorted(index, key=index.get)


@pytest.mark.parametrize('name', ['.', '..', 'data', 'data/'])
def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    touch(tmp_path, *images('data/here/a', 'data/here/b'))
    monkeypatch.chdir(tmp_path / ('data/here' if name == '..' else 'data' if name == '.' else ''))
    assert counts(read(Path(name))) == (('a', 'b'), 6, 2)
    assert read(Path(name)).name == 'data'


def test_what_systems_leave_is_not_trained_on(tmp_path: Path):
    touch(
        tmp_path, *images('a', 'b'), *images('a/.ipynb_checkpoints', 'b/@eaDir', '__MACOSX/a', '.git/a'), 'a/._0.png',
        'b/Thumbs.db')
    assert counts(read(tmp_path)) == (('a', 'b'), 6, 2)


def test_linked_classes_are_followed(tmp_path: Path):
    touch(tmp_path, *images('pool/a', 'data/train/b', 'data/val/b'))
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'a').symlink_to(tmp_path / 'pool' / 'a')
    (tmp_path / 'data' / 'train' / 'b' / 'up').symlink_to(tmp_path / 'data')
    data = read(tmp_path / 'data')
    assert counts(data) == (('a', 'b'), 8, 8)
    assert any(note.startswith('4 of 8 validation images are among the training images') for note in data.notes)


def test_the_same_image_on_both_sides_is_told(tmp_path: Path):
    touch(tmp_path, *images('train/a', 'train/b', 'val/a', 'val/b'))
    assert read(tmp_path).notes == []
    with Image.open(tmp_path / 'train/a/1.png') as image:
        image.save(tmp_path / 'val/a/copy.bmp')
    [note] = read(tmp_path).notes
    assert note.startswith('1 of 9 validation images')
    assert f'{tmp_path}/val/a/copy.bmp is {tmp_path}/train/a/1.png' in note
    shutil.rmtree(tmp_path / 'val')  # what is split off has one of each class
    assert read(tmp_path).notes == []
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


def test_a_class_of_heic(tmp_path: Path):
    pillow_heif = pytest.importorskip('pillow_heif')
    touch(tmp_path, *images('a'), 'b/')
    for i in range(4):
        pillow_heif.from_pillow(Image.new('RGB', (16, 16), (i * 60, 0, 0))).save(tmp_path / 'b' / f'{i}.heic')
    data = read(tmp_path)
    assert counts(data) == (('a', 'b'), 6, 2)
    assert data.notes == []


def test_bad_files_without_the_check(tmp_path: Path):
    """The next image comes in place of a bad one, as in timm's datasets."""
    touch(tmp_path, *images('train/a', 'train/b', 'val/a', 'val/b'))
    bad = tmp_path / 'train/b/3.png'
    bad.write_bytes(bad.read_bytes()[:50])
    data = read(tmp_path, list_all)
    assert counts(data) == (('a', 'b'), 8, 8)
    assert [data.train[i][1] for i in range(8)] == [0] * 4 + [1] * 3 + [0]  # the first comes after the last
    assert data.train[7][0] == data.train[0][0]
    assert data.train.skipped == [str(bad)]
    assert data.val.skipped == []


def test_bad_files_change_neither_the_split_nor_the_fingerprint(tmp_path: Path):
    touch(tmp_path, *images('a', 'b', count=10))
    whole = read(tmp_path)
    before = open_sources(str(tmp_path)).fingerprint
    bad = Path(whole.train.dataset.samples[whole.train.indices[0]][0])
    bad.write_bytes(b'')
    checked, listed = read(tmp_path), read(tmp_path, list_all)
    assert checked.val.indices == listed.val.indices == whole.val.indices
    assert checked.train.indices == whole.train.indices[1:]
    assert listed.train.indices == whole.train.indices
    assert open_sources(str(tmp_path)).fingerprint == before
    bad.rename(bad.with_name('other.png'))
    assert open_sources(str(tmp_path)).fingerprint != before


def test_a_run_without_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = draw(tmp_path / 'fruit', {'red': 5, 'green': 5})
    for name in ('red/1.png', 'green/2.png'):
        (tree / name).write_bytes((tree / name).read_bytes()[:60])
    command = ['finetune', str(tree), *FAST, '--epochs', '1', '--no-check-images', '--workers', '1', '--output']
    assert main([*command, str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr()
    assert '8 images to train on, 2 to validate on' in printed.out
    assert f'Warning: 2 images could not be read, and the next ones were taken: {tree}/green/2.png' in printed.out
    assert 'Traceback' not in printed.err

    for path in tree.rglob('*.png'):
        path.write_bytes(b'')
    assert main([*command, str(tmp_path / 'none')]) == 2
    error = capsys.readouterr().err
    assert 'None of 8 images can be read' in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'none').exists()


def test_an_image_that_stands_for_another_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw(tmp_path / 'data' / 'train', {'red': 4, 'green': 4})
    bad = draw(tmp_path / 'data' / 'val', {'red': 2, 'green': 3}) / 'red' / '0.png'
    bad.write_bytes(bad.read_bytes()[:60])
    command = ['finetune', str(tmp_path / 'data'), *FAST, '--epochs', '1', '--no-check-images', '--output']
    assert main([*command, str(tmp_path / 'out')]) == 0
    assert f'1 images could not be read, and the next ones were taken: {bad}' in capsys.readouterr().out
    assert '% on 4 validation images' in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize(('data', 'words'), [
    ('wds/x', 'timm-eca run train.py'), ('torch/x', 'timm-eca run train.py'), ('hfids/x', 'timm-eca run train.py'),
    ('{file}', 'unpacked'), ('absent', 'not a folder of images'),
])
def test_what_is_not_taken(tmp_path: Path, data: str, words: str):
    (tmp_path / 'x.tar').write_bytes(b'')
    with pytest.raises(TimmEcaError, match=words):
        open_sources(data.format(file=tmp_path / 'x.tar'))


def test_datasets_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    datasets = pytest.importorskip('datasets')
    tree = draw(tmp_path / 'fruit', {'red': 10, 'green': 15, 'yellow': 10})
    rows = [{'image': str(path), 'label': path.parent.name} for path in sorted(tree.rglob('*.png'))]
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=sorted(COLOURS))})
    whole = datasets.Dataset.from_list(rows, features=features).train_test_split(8, seed=0)
    (tmp_path / 'hf').mkdir()
    whole['train'].to_parquet(tmp_path / 'hf' / 'train.parquet')
    whole['test'].to_parquet(tmp_path / 'hf' / 'test.parquet')
    name = f'hfds/{tmp_path / "hf"}'
    command = ['finetune', name, *FAST, '--epochs', '1', '--output', str(tmp_path / 'out')]
    assert main(command) == 2
    assert '--val-split' in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, '--val-split', 'test', '--no-check-images']) == 2
    assert 'leave out --no-check-images' in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, '--val-split', 'test']) == 0
    assert '27 images to train on, 8 to validate on, 3 classes' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out/config.json').read_text())['label_names'] == sorted(COLOURS)
