"""The cards in `hub_cards/`, and that what they say can be done."""
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.hub_cards import write_hub_cards
from helpers.hub_double import HubDouble
from helpers.official_files import official_state_dict, save_official
from huggingface_hub import ModelCard
from timm.models import create_model

from timm_eca.conversion.convert import convert
from timm_eca.weights.hub import point_to_repository, push_folder
from timm_eca.weights.official import OFFICIAL, TAG

CARDS = Path(__file__).parents[2] / 'hub_cards'


def _snippets(text: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def test_cards_are_not_stale(tmp_path: Path):
    """`tests/helpers/hub_cards.py` writes them anew."""
    write_hub_cards(tmp_path)
    names = {f'{model}.{TAG}.md' for model in OFFICIAL}
    assert {path.name for path in CARDS.iterdir()} == {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (CARDS / name).read_text() == (tmp_path / name).read_text(), name


@pytest.mark.parametrize('model', OFFICIAL)
def test_metadata(model: str):
    official = OFFICIAL[model]
    card = ModelCard.load(CARDS / f'{model}.{TAG}.md')
    assert card.data.license == 'mit'
    assert card.data.library_name == 'timm'
    assert card.data.pipeline_tag == 'image-classification'
    assert card.data.datasets == ['imagenet-1k']
    assert card.data.model_name == f'{model}.{TAG}'
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        'Top-1 accuracy (reported by the authors)': official.top1,
        'Top-5 accuracy (reported by the authors)': official.top5,
    }
    assert all(result.source_url == 'https://github.com/BangguWu/ECANet' for result in results.values())
    assert ', '.join(map(str, official.kernel_sizes)) in card.text
    assert official.file in card.text
    assert all('import timm_eca' in snippet for snippet in _snippets(card.text) if 'create_model' in snippet)


def test_first_screen():
    """Above all else: how to install it, how to load it, what to fine-tune, and which accuracy is meant."""
    text = ModelCard.load(CARDS / f'eca_resnet50.{TAG}.md').text
    first = '\n'.join(text.splitlines()[:24])
    assert 'pip install timm_eca' in first
    assert 'import timm_eca' in first
    assert f"create_model('hf-hub:timm-eca/eca_resnet50.{TAG}', pretrained=True)" in first
    assert '--model eca_resnet50.a1_in1k' in first
    assert '77.42 %' in first
    assert '77.48 %' in first
    assert all('local-dir' not in path.read_text() for path in CARDS.iterdir())


def test_snippets_run(
        mobilenetv2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each snippet of a card, run by itself in the converted folder, prints what it says."""
    from PIL import Image

    folder = convert(mobilenetv2_file, provenance='downloaded').folder
    name = f'eca_mobilenetv2.{TAG}'
    card = (folder / 'README.md').read_bytes()
    assert point_to_repository(card, f'timm-eca/{name}') == (CARDS / f'{name}.md').read_bytes()
    monkeypatch.chdir(folder)
    picture = tmp_path / 'picture.png'
    Image.new('RGB', (300, 260), (200, 60, 20)).save(picture)
    monkeypatch.setattr('urllib.request.urlopen', lambda url: picture.open('rb'))
    snippets = _snippets(card.decode())
    assert len(snippets) == 3
    results: dict[str, object] = {}
    for snippet in snippets:
        capsys.readouterr()
        scope: dict[str, object] = {}
        exec(compile(snippet, 'card', 'exec'), scope)
        results |= scope
        said = re.findall(r'^# (torch\.Size.*)$', snippet, re.MULTILINE)
        if said:
            assert capsys.readouterr().out.splitlines() == said
    assert results['top5'].indices.shape == (1, 5)


def test_where_the_examples_point():
    card = b"'local-dir:.' `local-dir:.` local-dir:. local-dir:./mine local-dir:.hidden"
    assert point_to_repository(card, 'me/mine') == (
        b"'hf-hub:me/mine' `hf-hub:me/mine` hf-hub:me/mine local-dir:./mine local-dir:.hidden")


def test_card_of_other_weights_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = save_official(tmp_path / 'mine.pth.tar', official_state_dict('eca_resnet18', num_classes=0, in_chans=1))
    folder = convert(file, tag='mine').folder
    monkeypatch.chdir(folder)
    text = (folder / 'README.md').read_text()
    card = ModelCard(text)
    assert not card.data.eval_results
    assert card.data.datasets is None
    assert card.data.license is None
    assert 'top-1' not in text
    assert 'not known to be weights that the authors of ECA-Net published' in text
    assert 'Image classification' not in text
    for snippet in _snippets(text):
        exec(compile(snippet, 'card', 'exec'), {})


def test_no_card_of_a_secret():
    """Cards are the same on every machine: no path or variable of this one is in them."""
    text = ''.join(path.read_text() for path in CARDS.iterdir())
    assert os.path.expanduser('~') + '/' not in text
    assert torch.__version__ not in text


def test_pushed_card(checkpoint: Path, tmp_path: Path, hub: HubDouble, caplog: pytest.LogCaptureFixture):
    """On the Hub the examples load from the repository. A name that says another model is warned of."""
    folder = convert(checkpoint, tmp_path / 'folder').folder
    local = (folder / 'README.md').read_bytes()
    for name, warned in (('eca-mobilenetv2_050.mine', ''), ('eca_resnet50.mine', 'eca_resnet50'), ('mine', '')):
        caplog.clear()
        push_folder(folder, f'timm-eca/{name}')
        pushed = hub.repos[f'timm-eca/{name}'].head().files['README.md']
        assert pushed == point_to_repository(local, f'timm-eca/{name}')
        assert f"create_model('hf-hub:timm-eca/{name}', pretrained=True)".encode() in pushed
        assert b'local-dir' not in pushed
        assert (f'says {warned}' in caplog.text) == bool(warned)
    assert (folder / 'README.md').read_bytes() == local


def test_card_of_fine_tuned_weights():
    """It has the license and the repository of the weights that it started from, where those are known."""
    from timm_eca.analysis.evaluate import Evaluation, Result
    from timm_eca.finetune.card import render_finetuned_card

    model = create_model('eca_mobilenetv2_050', num_classes=2)
    config = {
        'architecture': 'eca_mobilenetv2_050', 'label_names': ['cat', 'dog'],
        'pretrained_cfg': {**model.pretrained_cfg, 'input_size': [3, 32, 32]}}
    evaluation = Evaluation([Result(0, 0, 1., True), Result(1, 0, 1., True)], ['cat', 'dog'])
    for origin in (('apache-2.0', 'timm/mobilenetv2_050.lamb_in1k'), (None, None)):
        model.pretrained_cfg.update(license=origin[0], hf_hub_id=origin[1])
        card = ModelCard(render_finetuned_card(
            model, config, 'the pretrained weights', 'pets', 1, 1, evaluation, 8, 'timm-eca finetune'))
        assert (card.data.license, card.data.base_model) == origin
        assert 'pip install timm_eca' in '\n'.join(card.text.splitlines()[:8])
