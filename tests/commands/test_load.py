"""The options that name a model and its weights, and the results that commands write."""
import argparse
import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers.image_folders import draw
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from timm_eca.commands import console
from timm_eca.commands.main import main

MODEL = 'eca_test_resnet'


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw(tmp_path / 'images', {'red': 1, 'green': 1})


def _predict(capsys: pytest.CaptureFixture[str], images: Path, *options: object) -> list[dict]:
    assert main(['predict', str(images), '--json', *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def _refuse(capsys: pytest.CaptureFixture[str], images: Path, *options: object) -> str:
    assert main(['predict', str(images), *map(str, options)]) == 2
    return capsys.readouterr().err


def test_checkpoints(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Files of timm's train.py (averaged weights first) and state dicts, with any number of classes."""
    torch.manual_seed(0)
    model, raw = (timm.create_model(MODEL, num_classes=3) for _ in range(2))
    saver = CheckpointSaver(
        raw, torch.optim.SGD(raw.parameters()), argparse.Namespace(model=MODEL, num_classes=3), checkpoint_dir=tmp_path)
    saver.save_checkpoint(0, 50.0)
    best = torch.load(tmp_path / 'model_best.pth.tar', weights_only=False)
    torch.save({**best, 'state_dict_ema': model.state_dict()}, tmp_path / 'model_best.pth.tar')
    save_file(raw.state_dict(), tmp_path / 'raw.safetensors')
    for name, network in ('model', model), ('raw', raw):
        save_for_hf(network, tmp_path / name, safe_serialization=True)

    wanted, wanted_raw = (_predict(capsys, images, '--model', tmp_path / name) for name in ('model', 'raw'))
    assert wanted != wanted_raw
    checkpoint = ('--checkpoint', tmp_path / 'model_best.pth.tar')
    assert _predict(capsys, images, '--model', MODEL, *checkpoint) == wanted
    assert _predict(capsys, images, '--model', MODEL, *checkpoint, '--no-ema') == wanted_raw
    assert _predict(capsys, images, '-m', MODEL, '--checkpoint', tmp_path / 'raw.safetensors') == wanted_raw
    assert _predict(capsys, images, '--model', tmp_path / 'raw', *checkpoint) == wanted

    error = _refuse(capsys, images, '--model', 'eca_resnet18', *checkpoint)
    assert f'the model eca_resnet18 with the weights {checkpoint[1]} can\'t be loaded' in error
    assert 'name the model that the checkpoint was trained as' in error
    assert error.count('\n') == 1
    assert 'absent.pth can\'t be read' in _refuse(capsys, images, '--model', MODEL, '--checkpoint', 'absent.pth')


def test_what_is_no_model(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / 'model_best.pth.tar'
    file.write_bytes(b'weights')
    error = _refuse(capsys, images, '--model', file)
    assert f'--model MODEL --checkpoint {file}' in error
    assert f'timm-eca convert {file} --output DIR' in error
    for path in (tmp_path / 'absent', './nothere', 'absent.safetensors'):
        error = _refuse(capsys, images, '--model', path)
        assert f'{path} does not exist: check the path' in error
        assert 'hf-hub' not in error
    assert 'hf-hub:absent/folder' in _refuse(capsys, images, '--model', 'absent/folder')
    # A model of timm itself, and no network.
    error = _refuse(capsys, images, '--model', 'resnet18')
    assert 'No weights for resnet18' in error
    assert '--checkpoint FILE' in error


def test_runs_of_finetune(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Their state is not a checkpoint. An unfinished run has no model yet."""
    run = tmp_path / 'run'
    (run / 'checkpoints').mkdir(parents=True)
    state = run / 'checkpoints' / 'timm_eca.pt'
    for content, words in (
            ({'command': 'timm-eca finetune photos'}, 'run of finetune: continue it with `timm-eca finetune photos`.'),
            ({'rows': []}, 'run the same timm-eca finetune command again'),
            ([], 'run the same timm-eca finetune command again')):
        torch.save(content, state)
        assert words in _refuse(capsys, images, '--model', run)
    state.write_bytes(b'damaged')
    assert 'run the same timm-eca finetune command again' in _refuse(capsys, images, '--model', run)
    error = _refuse(capsys, images, '--model', MODEL, '--checkpoint', state)
    assert f'{state} is the state of a finetune run' in error
    assert f'--model {run}.\n' in error


def test_a_registered_name_wins_over_a_folder(
        images: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path(MODEL).mkdir()
    assert f'No weights for {MODEL}' in _refuse(capsys, images, '--model', MODEL)
    assert f'./{MODEL}' in caplog.text
    save_for_hf(timm.create_model(MODEL, num_classes=3), MODEL, safe_serialization=True)
    wanted = _predict(capsys, images, '--model', f'./{MODEL}', '--img-size', 96)
    assert len(wanted[0]['predictions']) == 3
    # Of tags that are not registered: a folder in the working directory, and one in the weights directory.
    shutil.copytree(MODEL, f'{MODEL}.mine')
    shutil.copytree(MODEL, home / f'{MODEL}.other')
    for tag in ('mine', 'other'):
        assert _predict(capsys, images, '--model', f'{MODEL}.{tag}', '--img-size', 96) == wanted


def test_img_size(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also for a model with an image size of its own."""
    torch.manual_seed(0)
    save_for_hf(
        timm.create_model('test_vit', num_classes=3, in_chans=1).eval(), tmp_path / 'model', safe_serialization=True)
    found = _predict(capsys, images, '--model', tmp_path / 'model', '--img-size', 64)
    network = timm.create_model(
        f'local-dir:{tmp_path / "model"}', pretrained=True, pretrained_cfg_overlay={'input_size': (1, 64, 64)}).eval()
    config = timm.data.resolve_data_config({'img_size': 64, 'in_chans': 1}, model=network)
    pixels = timm.data.create_transform(**config)(Image.open(found[0]['image']).convert('L'))
    assert pixels.shape == (1, 64, 64)
    with torch.inference_mode():
        best = network(pixels[None]).softmax(-1).max()
    assert found[0]['predictions'][0]['probability'] == pytest.approx(float(best), abs=2e-6)


def test_results_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_for_hf(
        timm.create_model(MODEL, num_classes=3), tmp_path / 'model', model_config={'label_names': ['a', 'b,c', 'd']})
    options = ('--model', tmp_path / 'model', '--topk', 2, '--results-file')
    printed = _predict(capsys, images, *options, tmp_path / 'results.json')
    assert json.loads((tmp_path / 'results.json').read_text()) == printed
    assert main(['predict', str(images), *map(str, options), str(tmp_path / 'results.csv')]) == 0
    with (tmp_path / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['filename'] for row in rows] == [result['image'] for result in printed]
    for row, result in zip(rows, printed):
        assert [(row[f'index_{i}'], row[f'label_{i}'], row[f'prob_{i}']) for i in range(2)] == [
            tuple(map(str, best.values())) for best in result['predictions']]


@pytest.mark.parametrize('command', ['gates', 'evaluate'])
def test_progress_without_a_terminal(
        command: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(console, '_REPORT_EVERY', 0)
    save_for_hf(timm.create_model(MODEL, num_classes=2), tmp_path / 'model')
    assert main([command, str(images), '--model', str(tmp_path / 'model'), '-b', '1']) == 0
    assert capsys.readouterr().err.splitlines() == ['1 of 2 images', '2 of 2 images']
