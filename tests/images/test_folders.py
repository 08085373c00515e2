"""The splits and the classes that are found in folders as people have them, and in datasets by name."""
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.image_folders import images, touch

from timm_eca.errors import TimmEcaError
from timm_eca.images.reader import ImageError
from timm_eca.images.sources import Sources, open_sources, open_split


def counts(data: Sources) -> tuple[tuple[str, ...], int, int | None]:
    return data.class_names, len(data.train), None if data.val is None else len(data.val)


@pytest.mark.parametrize('wrapper', ['', 'PlantVillage/', 'archive/Images/color/', 'x/train/', 'seg_train/seg_train/'])
def test_folders_around_the_classes(tmp_path: Path, wrapper: str):
    touch(tmp_path, *images(f'{wrapper}a', f'{wrapper}b'))
    data = open_sources(str(tmp_path))
    assert counts(data) == (('a', 'b'), 8, None)
    assert data.notes == ()
    assert len(open_split(str(tmp_path)).train) == 8


@pytest.mark.parametrize(('train', 'val'), [
    ('train', 'val'), ('Training', 'Validation'), ('train_data', 'val_data'), ('trainset', 'valset'),
    ('train2', 'val2'), ('train_images', 'valid'), ('data/Train Set', 'data/dev'), ('x/seg_train/x', 'x/seg_val/y'),
])
def test_names_of_splits(tmp_path: Path, train: str, val: str):
    touch(tmp_path, *images(f'{train}/a', f'{train}/b'), *images(f'{val}/a', f'{val}/b', count=3))
    assert counts(open_sources(str(tmp_path))) == (('a', 'b'), 8, 6)
    assert counts(open_split(str(tmp_path))) == (('a', 'b'), 6, None)


@pytest.mark.parametrize(('train', 'test'), [('train', 'test'), ('training_set', 'test_set'), ('Training', 'Testing')])
def test_a_test_split_is_used_where_it_is_named(tmp_path: Path, train: str, test: str):
    touch(tmp_path, *images(f'{train}/a', f'{train}/b'), *images(f'{test}/a', f'{test}/b', count=2))
    assert counts(open_sources(str(tmp_path))) == (('a', 'b'), 8, None)
    assert counts(open_sources(str(tmp_path), val_split='test')) == (('a', 'b'), 8, 4)
    assert counts(open_sources(str(tmp_path), train_split=test, val_split=train)) == (('a', 'b'), 4, 8)
    assert len(open_split(str(tmp_path), split='test').train) == 4
    with pytest.raises(ImageError) as caught:
        open_split(str(tmp_path))
    assert caught.value.problem == f'{tmp_path} has no split to validate on'
    assert set(caught.value.fixes[0].split(' ')) == {'add', 'or', '--split', train, test}


@pytest.mark.parametrize(('names', 'words'), [
    (images('2023/cat', '2023/dog', '2024/cat', '2024/dog'), ('2023/cat, 2023/dog, 2024/cat', '--train-split')),
    (images('cat/train', 'cat/val', 'dog/train', 'dog/val'), ('cat/train, cat/val', 'like splits')),
    (images('train', 'test'), ('test, train', 'like splits')),
    (images('cat', 'cat/more', 'dog'), ('cat holds images and also folders of images',)),
    (images('train/a', 'training/a', 'train_2/a', 'Train/a'), ('Train, train', '--train-split')),
    (images('bus/a', 'car/c', 'train/a2', 'train/b2'), ('has the split train, but also', '(bus, car)')),
    (images('bus/a', 'steam_train/a2', 'steam_train/b2'), ('has the split steam_train, but also', '--train-split')),
    ([*images('a', 'b'), 'c/'], ('c has no images',)),
    (['1.png', '2.png'], ('no images in folders of their classes',)),
    (images('train/a', 'train/b', 'val/a', 'val/c'), ('1 classes that', '(c)')),
    ([*images('train/a', 'train/b'), 'val/a/'], ('val has no images',)),
    (images('train/a', 'train/b', 'val/x/a', 'val/y/a'), ('same name in several places',)),
    (images('a', 'b\n'), ('not text',)),
])
def test_what_is_not_clear_is_refused(tmp_path: Path, names: Sequence[str], words: Sequence[str]):
    touch(tmp_path, *names)
    with pytest.raises(TimmEcaError) as caught:
        open_sources(str(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value).count('\n') == 0


def test_a_place_is_named_by_its_option(tmp_path: Path):
    touch(tmp_path, *images('2023/cat', '2023/dog', '2024/cat', '2024/dog'))
    data = open_sources(str(tmp_path), train_split='2023', val_split='2024')
    assert counts(data) == (('cat', 'dog'), 8, 8)
    assert set(data.train.files) == {str(path) for path in tmp_path.glob('2023/*/*')}
    with pytest.raises(TimmEcaError, match=r'no folder 2025 .* 2023, 2024'):
        open_sources(str(tmp_path), train_split='2025')


def test_innermost_folders_are_classes_and_it_is_said(tmp_path: Path):
    touch(tmp_path, *images('birds/owl', 'birds/hawk', 'cat', 'steam_train'), 'cover.png', 'cat/labels.npy')
    data = open_sources(str(tmp_path))
    assert data.class_names == ('cat', 'hawk', 'owl', 'steam_train')
    assert any('birds/hawk, birds/owl' in note for note in data.notes)
    assert any('cover.png' in note and '1 files are in no folder' in note for note in data.notes)


def test_classes_are_in_the_order_of_timm(tmp_path: Path):
    readers = pytest.importorskip('timm.data.readers.reader_image_folder')
    touch(tmp_path, *images('10', '9', 'B', 'a', 'x/n2', 'x/n10', count=1))
    _, index = readers.find_images_and_targets(str(tmp_path))
    assert list(open_sources(str(tmp_path)).class_names) == sorted(index, key=index.get)
    touch(tmp_path / 'odd', *images('①', '12²', '3', count=1))  # digits that `int` refuses
    assert open_sources(str(tmp_path / 'odd')).class_names == ('3', '12²', '①')


@pytest.mark.parametrize('name', ['.', '..', 'data', 'data/'])
def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    touch(tmp_path, *images('data/here/a', 'data/here/b'))
    monkeypatch.chdir(tmp_path / ('data/here' if name == '..' else 'data' if name == '.' else ''))
    data = open_sources(name)
    assert (data.name, *counts(data)) == ('data', ('a', 'b'), 8, None)


def test_what_systems_leave_and_links(tmp_path: Path):
    touch(
        tmp_path, *images('pool/a', 'data/train/b', 'data/val/b'), 'pool/a/._0.png', 'data/train/b/Thumbs.db',
        *images('data/train/.git', 'data/__MACOSX/a', 'pool/a/.ipynb_checkpoints', 'data/val/b/@eaDir'), 'data/docs/')
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'a').symlink_to(tmp_path / 'pool' / 'a')
    (tmp_path / 'data' / 'train' / 'b' / 'up').symlink_to(tmp_path / 'data')
    assert counts(open_sources(str(tmp_path / 'data'))) == (('a', 'b'), 8, 8)


def test_a_folder_hides_the_digits_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    for open_images in (open_sources, open_split):
        sources = open_images('digits')
        assert (len(sources.train), sources.class_names) == (1797, tuple('0123456789'))
        assert len(sources.notes) == (open_images is open_split)  # a model may have been trained on them
    touch(tmp_path / 'digits', *images('a', 'b'))
    for open_images in (open_sources, open_split):
        sources = open_images('digits')
        assert (len(sources.train), sources.class_names) == (8, ('a', 'b'))
        assert any('not scikit-learn' in note for note in sources.notes)


@pytest.mark.parametrize(('data', 'words'), [
    ('wds/x', 'timm-eca run train.py'), ('{file}', 'unpacked'), ('absent', 'not a folder of images'),
])
def test_what_is_not_taken(tmp_path: Path, data: str, words: str):
    (tmp_path / 'x.tar').write_bytes(b'')
    with pytest.raises(TimmEcaError, match=words):
        open_sources(data.format(file=tmp_path / 'x.tar'))


def test_datasets_by_name(tmp_path: Path):
    datasets = pytest.importorskip('datasets')
    touch(tmp_path, 'image.png')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['b', 'a'])})
    (tmp_path / 'hf').mkdir()

    def write(split: str, labels: list[int]) -> None:
        rows = [{'image': str(tmp_path / 'image.png'), 'label': label} for label in labels]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'hf' / f'{split}.parquet')

    write('train', [0, 0, 1])
    write('test', [0, 1])
    name = f'hfds/{tmp_path / "hf"}'
    with pytest.raises(ImageError, match=r'validation.*--val-split'):
        open_sources(name)
    data = open_sources(name, val_split='test', in_chans=1)
    assert counts(data) == (('b', 'a'), 3, 2)
    assert [image.label for image in data.train] == [0, 0, 1]
    assert data.val[0].image.mode == 'L'
    assert open_split(name, split='test').fingerprint == open_split(name, split='test').fingerprint
    write('validation', [0, -1])
    with pytest.raises(ImageError, match='label -1'):
        open_split(name)
