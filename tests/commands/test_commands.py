"""`list`, `convert` and the installed command."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_double import HubDouble
from huggingface_hub import hf_hub_download

from timm_eca.commands.main import main
from timm_eca.weights.official import OFFICIAL
from timm_eca.weights.store import hub_id

ROOT = Path(__file__).parents[2]


def _list(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    assert main(['list', *args]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return {name: row for name, row in rows.items() if name.startswith('eca_')}


def test_list(capsys: pytest.CaptureFixture[str]):
    """Without a filter: the ten models, within 100 columns."""
    rows = _list(capsys)
    assert list(rows) == timm.list_models(module=['eca_resnet', 'eca_mobilenetv2'])
    assert len(rows) == 10
    for model, official in OFFICIAL.items():
        params, kernel_sizes, top1, top5, weights, *_ = rows[model].split()
        network = timm.create_model(model, device='meta')
        assert int(params.replace(',', '')) == sum(p.numel() for p in network.parameters())
        assert kernel_sizes == ','.join(map(str, official.kernel_sizes))
        assert (top1, top5) == (f'{official.top1:.2f}', f'{official.top5:.2f}')
        assert weights == 'bangguwu_in1k,'
    assert rows['eca_wide_resnet50_2'].endswith('racm_in1k, tv_in1k, tv2_in1k')
    assert rows['eca_resnet50'].endswith(', ...')
    main(['list'])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_list_of_the_cache(hub: HubDouble, capsys: pytest.CaptureFixture[str]):
    for repo_id in (hub_id('eca_resnet18.bangguwu_in1k'), 'timm/resnet34.a1_in1k'):
        hub.add_repo(repo_id, {'model.safetensors': b'weights'})
        hf_hub_download(repo_id, 'model.safetensors')
    rows = _list(capsys)
    assert [name for name, row in rows.items() if '+' in row] == ['eca_resnet18', 'eca_resnet34']
    assert ' bangguwu_in1k+, ' in rows['eca_resnet18']
    assert ' a1_in1k+, ' in rows['eca_resnet34']


def test_list_of_some_models(capsys: pytest.CaptureFixture[str]):
    """With a filter: the models that match, also twins, with all tags."""
    rows = _list(capsys, 'eca_resnet50')
    tags = [name.partition('.')[2] for name in timm.list_models('eca_resnet50', include_tags=True)]
    row = rows.pop('eca_resnet50').split(maxsplit=4)
    assert row[:4] == ['25,557,112', '3,5,5,7', '77.42', '93.62']
    assert row[4].startswith('bangguwu_in1k, ')
    assert sorted(row[4].split(', ')) == sorted(tags)
    assert not rows
    assert ' tv2_in1k, ' in _list(capsys, 'regnety_004')['eca_regnety_004']
    assert list(_list(capsys, 'eca_resnet*.fb_ssl*')) == ['eca_resnet18', 'eca_resnet50']
    assert list(_list(capsys, 'regnety_00[24]')) == ['eca_regnety_002', 'eca_regnety_004']
    assert list(_list(capsys, 'mobilenetv2_100')) == ['eca_mobilenetv2']
    assert _list(capsys, 'eca_rexnet_100')['eca_rexnet_100'].split()[1] == '3/5'  # in one stage


def test_list_shows_accuracies_of_the_authors_weights_only(capsys: pytest.CaptureFixture[str]):
    assert ' 77.42  93.62  bangguwu_in1k' in _list(capsys, 'eca_resnet50.bang*')['eca_resnet50']
    assert main(['list', 'eca_resnet50.a1_*']) == 0
    header, row, *legend = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'parameters', 'kernel', 'sizes', 'weights']
    assert row.split() == ['eca_resnet50', '25,557,112', '3,5,5,7', 'a1_in1k']
    assert not [line for line in legend if 'bangguwu' in line or 'ImageNet' in line or '*' in line or '3/5' in line]


@pytest.mark.parametrize(('filter', 'error'), [
    ('eca_resnet5', 'did you mean eca_resnet50'),
    ('eca_resnet*.a1_in1', 'there are no weights a1_in1 of eca_resnet*: did you mean a1_in1k'),
    ('eca_cspresnet50d.untrained', 'there are no weights untrained of eca_cspresnet50d.'),
    ('vgg16', 'timm\'s vgg16 has no place for ECA'),
    ('nothing*', 'timm-eca list "eca_*" shows all models'),
])
def test_list_of_nothing(filter: str, error: str, capsys: pytest.CaptureFixture[str]):
    assert main(['list', filter]) == 2
    assert error in capsys.readouterr().err


def test_list_of_the_weights_directory(
        resnet18_file: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    main(['convert', str(resnet18_file)])
    shutil.copytree(home / 'eca_resnet18.bangguwu_in1k', home / 'eca_resnet18.mine')
    capsys.readouterr()
    assert _list(capsys)['eca_resnet18'].endswith('bangguwu_in1k*, mine*, a1_in1k, ...')
    assert ' bangguwu_in1k*, mine*, a1_in1k, ' in _list(capsys, 'eca_resnet18')['eca_resnet18']
    (home / 'eca_resnet18.bangguwu_in1k' / 'model.safetensors').unlink()
    for name, content in (('bad', '[1]'), ('worse', '{"architecture": "resnet34"}')):
        shutil.copytree(home / 'eca_resnet18.mine', home / f'eca_resnet18.{name}')
        (home / f'eca_resnet18.{name}' / 'config.json').write_text(content)
    (home / 'eca_resnet18.file').write_text('not a folder')
    row = _list(capsys, 'eca_resnet18')['eca_resnet18']
    assert ' bangguwu_in1k!, bad!, mine*, worse!, a1_in1k, ' in row
    assert 'file' not in row


def test_convert_says_what_it_did(resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['convert', str(resnet18_file), '--output', str(tmp_path / 'folder')]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) < 7
    for part in ('eca_resnet18', '3, 5, 7, 7', '1000 classes', 'optimizer', '130 tensors', 'bit for bit'):
        assert part in output
    use = re.search(r'use: (.*)', output)
    assert use
    assert eval(use[1], {'timm': timm}).num_classes == 1000


def test_organisation_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('TIMM_ECA_HUB_ORG', 'my-lab')
    assert hub_id('eca_resnet18.bangguwu_in1k') == 'my-lab/eca_resnet18.bangguwu_in1k'
    with pytest.raises(RuntimeError, match=r'my-lab/eca_resnet18\.bangguwu_in1k'):
        timm.create_model('eca_resnet18', pretrained=True)


@pytest.mark.slow
def test_installed_command_with_a_reader_that_stops_reading():
    """The console script. Other tests start `python -m timm_eca`."""
    command = f'{Path(sys.executable).with_name("timm-eca")} list "eca_mobilenetv2*" | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count('\n') == 1
    assert done.stderr == ''


@pytest.mark.slow
def test_transformers_loads_the_folder(checkpoint: Path, tmp_path: Path):
    """transformers' wrapper reads `config.json` and the weights by itself, without timm's loader and our filter."""
    transformers = pytest.importorskip('transformers')
    main(['convert', str(checkpoint), '--output', str(tmp_path / 'folder')])
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'folder').eval()
    model = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        # Not to the bit: transformers maps the file to memory, where it is aligned in another way.
        torch.testing.assert_close(wrapped(x).logits, model(x))
