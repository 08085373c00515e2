"""`timm-eca evaluate` and its parts."""
import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers.image_folders import draw
from timm.models import create_model, save_for_hf

from timm_eca.analysis.evaluate import Evaluation, Result, match_classes, write_evaluation
from timm_eca.commands.main import main
from timm_eca.errors import ModelError


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('model') / 'fruit'
    torch.manual_seed(0)
    network = create_model('eca_test_resnet', num_classes=3)
    save_for_hf(
        network, folder, safe_serialization=True,
        model_config={'label_names': ['yellow', 'red', 'green'], 'pretrained_cfg': {'input_size': (3, 32, 32)}})
    return folder


def run(*args: str | Path) -> int:
    return main(['evaluate', *map(str, args)])


def test_the_figures_by_hand():
    results = [Result(0, 0, 0.1, True), Result(0, 1, 2.0, True), Result(1, 1, 0.3, True), Result(1, 1, 0.4, False)]
    evaluation = Evaluation(results, list('abcdef'))
    assert evaluation.metrics == {'loss': pytest.approx(0.7), 'top1': 75, 'top5': 75}
    assert evaluation.confusion_matrix()[:2, :2].tolist() == [[1, 1], [0, 2]]
    a, b, c = evaluation.by_class()[:3]
    assert a == ('a', 2, 50, 100)
    assert b == ('b', 2, 100, pytest.approx(200 / 3))
    assert c == ('c', 0, None, None)
    assert 'top5' not in Evaluation(results, list('abcde')).metrics
    assert evaluation.worst_pairs() == [('a', 'b', 1)]


def test_many_classes_take_little_memory(tmp_path: Path):
    """A matrix of them all would take 80 GB."""
    count = 100_000
    results = [Result(i, i + 1, 1.0, True) for i in range(30)] * 2 + [Result(7, 9, 1.0, True)] * 3
    evaluation = Evaluation(results, [str(i) for i in range(count)])
    scores = evaluation.by_class()
    assert (len(scores), scores[7], scores[9]) == (count, ('7', 5, 0, 0), ('9', 2, 0, 0))
    assert [path.name for path in write_evaluation(tmp_path, evaluation)] == ['per_class.csv', 'confusions.csv']
    with (tmp_path / 'confusions.csv').open(newline='') as file:
        header, *pairs = csv.reader(file)
    assert (header, pairs[0], len(pairs)) == (['class', 'predicted', 'images'], ['7', '9', '3'], 20)


def test_the_command_says_what_predict_says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = draw(tmp_path / 'data', {'red': 5, 'green': 4, 'yellow': 3})
    assert run(data, '--model', model, '--json', '--output', tmp_path / 'out', '-b', '5') == 0
    found = json.loads(capsys.readouterr().out)
    assert main(['predict', str(data), '--model', str(model), '--json']) == 0
    predictions = json.loads(capsys.readouterr().out)
    pairs = [(Path(row['image']).parent.name, row['predictions']) for row in predictions]
    assert found['top1'] == pytest.approx(100 * sum(name == best[0]['name'] for name, best in pairs) / 12)
    losses = [-math.log(next(p['probability'] for p in best if p['name'] == name)) for name, best in pairs]
    assert found['loss'] == pytest.approx(sum(losses) / 12, abs=1e-3)
    assert (found['images'], found['unreadable'], 'top5' in found) == (12, 0, False)
    assert {row['name']: row['images'] for row in found['classes']} == {'yellow': 3, 'red': 5, 'green': 4}

    with (tmp_path / 'out' / 'per_class.csv').open(newline='') as file:
        table = list(csv.DictReader(file))
    assert [row['name'] for row in table] == ['yellow', 'red', 'green']
    with (tmp_path / 'out' / 'confusion_matrix.csv').open(newline='') as file:
        header, *matrix = csv.reader(file)
    assert header[1:] == [row[0] for row in matrix]
    assert [sum(map(int, row[1:])) for row in matrix] == [3, 5, 4]
    for row in table:
        hits = sum(name == row['name'] == best[0]['name'] for name, best in pairs)
        assert float(row['recall']) == pytest.approx(100 * hits / int(row['images']), abs=0.01)


def test_splits_and_damaged_images(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw(tmp_path / 'data' / 'train', {'red': 6, 'green': 6})
    held_out = draw(tmp_path / 'data' / 'val', {'red': 2, 'green': 3})
    assert run(tmp_path / 'data', '--model', model) == 0
    assert '5 images: top-1' in capsys.readouterr().out
    (tmp_path / 'data' / 'train' / 'red' / '0.png').write_bytes(b'no image')
    assert run(tmp_path / 'data', '--model', model, '--split', 'train') == 1
    printed = capsys.readouterr()
    assert '11 images: top-1' in printed.out
    assert '0.png: it is not an image' in printed.err
    held_out.rename(tmp_path / 'data' / 'test')  # the advice names the command's own option
    assert run(tmp_path / 'data', '--model', model) == 2
    error = capsys.readouterr().err
    assert '--split' in error
    assert '-split' not in error.replace('--split', '')


def test_matching_of_classes():
    imagenet = create_model('eca_test_resnet')
    assert match_classes(imagenet, ['n01443537', 'n01440764']) == [1, 0]
    assert match_classes(imagenet, ['0', '999']) == [0, 999]
    with pytest.raises(ModelError, match=r"has several classes 'crane'.*: 134 or n02012849; 517 or n03126707"):
        match_classes(imagenet, ['goldfish, Carassius auratus', 'crane'])
    assert match_classes(imagenet, ['goldfish, Carassius auratus', '134']) == [1, 134]
    assert match_classes(imagenet, ['goldfish, Carassius auratus', 'n03126707']) == [1, 517]
    unnamed = create_model('eca_test_resnet', num_classes=2)
    assert match_classes(unnamed, ['cat', 'dog']) == [0, 1]
    with pytest.raises(ModelError, match='cat'):
        match_classes(unnamed, ['cat', 'dog', 'bird'])


def test_images_that_nobody_labelled(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In datasets of the Hub they have the label -1."""
    datasets = pytest.importorskip('datasets')
    paths = sorted(draw(tmp_path / 'data', {'red': 2, 'green': 2}).rglob('*.png'))
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['green', 'red'])})
    for split, labels in (('train', [0, 0, 1, 1]), ('test', [0, 0, 1, -1])):
        rows = [{'image': str(path), 'label': label} for path, label in zip(paths, labels)]
        (tmp_path / 'hf').mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'hf' / f'{split}.parquet')
    name = f'hfds/{tmp_path / "hf"}'
    assert run(name, '--model', model, '--split', 'train', '--json') == 0
    assert json.loads(capsys.readouterr().out)['images'] == 4
    assert run(name, '--model', model, '--split', 'test') == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert 'the label -1' in printed.err
    assert printed.err.count('\n') == 1


def test_bad_input(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = draw(tmp_path / 'data', {'red': 2, 'blue': 2})
    assert run(data, '--model', model) == 2
    error = capsys.readouterr().err
    assert "no class 'blue'" in error
    assert 'yellow' in error
    with pytest.raises(SystemExit, match='2'):
        run(data, '--model', model, '-j', '-1')
    assert '-1 is less than 1' in capsys.readouterr().err


def test_a_package_that_is_not_installed(
        model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    monkeypatch.chdir(tmp_path)
    assert run('digits', '--model', model) == 2
    assert 'sklearn is not installed: pip install \'timm_eca[finetune]\'.\n' in capsys.readouterr().err
