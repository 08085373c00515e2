"""The images of a folder, a name, or a split, as finetune and evaluate open them."""
from pathlib import Path

import pytest
from helpers.image_folders import draw

from timm_eca.images.folders import SplitError
from timm_eca.images.reader import ImageError
from timm_eca.images.sources import open_sources, open_split

pytest.importorskip('sklearn')


def test_a_folder_hides_the_digits_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for open_images in (open_sources, open_split):
        sources = open_images('digits')
        assert (len(sources.train), sources.class_names) == (1797, tuple('0123456789'))
        assert len(sources.notes) == (open_images is open_split)  # a model may have been trained on them
    draw(tmp_path / 'digits', {'red': 2, 'green': 2})
    for open_images in (open_sources, open_split):
        sources = open_images('digits')
        assert (len(sources.train), sources.class_names) == (4, ('green', 'red'))
        assert any('not scikit-learn' in note for note in sources.notes)


@pytest.mark.parametrize('vehicle', ['train', 'steam_train'])
def test_a_class_that_looks_like_a_split_hides_no_other_class(tmp_path: Path, vehicle: str):
    draw(tmp_path, {'bus/a': 2, 'car/c': 2, f'{vehicle}/a2': 2, f'{vehicle}/b2': 2})
    with pytest.raises(SplitError) as caught:
        open_sources(str(tmp_path))
    assert caught.value.problem.endswith(f'has the split {vehicle}, but also other folders of images (bus, car)')
    assert '--train-split' in caught.value.fixes[0]
    assert len(open_sources(str(tmp_path), train_split=vehicle).train) == 4
    (tmp_path / vehicle).rename(tmp_path / 'locomotive')
    assert open_sources(str(tmp_path)).class_names == ('a', 'a2', 'b2', 'c')


def test_folders_beside_splits(tmp_path: Path):
    draw(tmp_path / 'data', {'train/a': 2, 'train/b': 2, 'test/a': 1})
    (tmp_path / 'data' / 'docs').mkdir()
    assert len(open_sources(str(tmp_path)).train) == 4


def test_the_split_to_evaluate(tmp_path: Path):
    draw(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 2})
    with pytest.raises(ImageError) as caught:
        open_split(str(tmp_path))
    assert caught.value.fixes == ('name the split with --split',)
    assert len(open_split(str(tmp_path), split='test').train) == 3
    draw(tmp_path, {'val/b': 5})
    assert (len(open_split(str(tmp_path)).train), open_split(str(tmp_path)).class_names) == (5, ('b',))


def test_class_folders_with_odd_digits(tmp_path: Path):
    draw(tmp_path, {'①': 1, '12²': 1, '3': 1})
    assert open_sources(str(tmp_path)).class_names == ('3', '12²', '①')
