"""The six cards in `hub_cards/` beside the models, and that the examples in cards work."""
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.complexity import count_complexity
from helpers.hub_double import HubDouble
from helpers.official_files import official_state_dict, save_official
from huggingface_hub import ModelCard
from timm.models import create_model, get_arch_pretrained_cfgs, save_for_hf

from timm_eca.conversion.convert import convert
from timm_eca.errors import ModelError
from timm_eca.models import export
from timm_eca.models.timm_form import as_timm_model
from timm_eca.weights.card import finetuned_card, official_card
from timm_eca.weights.digests import make_metadata, save_weights
from timm_eca.weights.hub import point_to_repository, push_folder
from timm_eca.weights.official import OFFICIAL, PAPER_NAME, PROVENANCES, REPOSITORY, TAG
from timm_eca.weights.store import HUB_ORG

CARDS = Path(__file__).parents[2] / 'hub_cards'
PAPER = {'eca_resnet18': (70.78, 89.92), 'eca_resnet50': (77.48, 93.68)}  # where it differs from the repository


def _snippets(text: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('model', [
    pytest.param(model, marks=pytest.mark.slow) if model in ('eca_resnet101', 'eca_resnet152') else model
    for model in OFFICIAL])
def test_card_agrees_with_the_code(model: str):
    assert {path.name for path in CARDS.glob(f'*.{TAG}.md')} == {f'{model}.{TAG}.md' for model in OFFICIAL}
    name, official = f'{model}.{TAG}', OFFICIAL[model]
    card = ModelCard.load(CARDS / f'{name}.md')
    data = card.data.to_dict()
    assert (data['license'], data['library_name'], data['datasets']) == ('mit', 'timm', ['imagenet-1k'])
    assert (data['pipeline_tag'], card.data.model_name) == ('image-classification', name)
    assert {(r.metric_name, r.metric_value, r.source_url) for r in card.data.eval_results} == {
        ('Top-1 accuracy (reported by the authors)', official.top1, REPOSITORY),
        ('Top-5 accuracy (reported by the authors)', official.top5, REPOSITORY)}

    network: Any = create_model(model, device='meta')
    counted, sizes = count_complexity(network), ', '.join(map(str, official.kernel_sizes))
    cfg, text = network.default_cfg, card.text
    percents = re.findall(r'\d+\.\d\d(?= %)', text)
    assert percents == [f'{value:.2f}' for value in (official.top1, official.top5, *PAPER.get(model, ()))]
    for words in (
            f'# Model card for {name}', f'{official.title} is', f'- **Architecture:** `{model}`',
            f'- **Kernel sizes of ECA by stage:** {sizes}',
            f'- **Params (M):** {counted.params / 1e6:.1f} ({counted.params:,}, of which {counted.eca_params} are of',
            f'- **GMACs:** {counted.multiply_adds / 1e9:.2f}',
            f'- **Activations (M):** {counted.activations / 1e6:.1f}',
            f'shorter side to {round(224 / cfg["crop_pct"])} ({cfg["interpolation"]}), centre crop 224',
            f'mean {cfg["mean"]}, std {cfg["std"]}', PAPER_NAME, REPOSITORY,
            f'[`{official.file}`]({official.url})', PROVENANCES['downloaded']):
        assert words in text, words
    row = (f'| {official.top1:.2f} | {official.top5:.2f} | {counted.params / 1e6:.1f} '
           f'| {counted.multiply_adds / 1e9:.2f} | {counted.activations / 1e6:.1f} | {sizes} |')
    for path in CARDS.glob(f'*.{TAG}.md'):  # each card compares them all
        assert f'| [{name}](https://huggingface.co/{HUB_ORG}/{name}) {row}' in path.read_text()
    [warm] = re.findall(rf'--model {model}\.(\w+)`', text)
    assert get_arch_pretrained_cfgs(model)[f'{model}.{warm}'].has_weights

    features = create_model(model, features_only=True, device='meta').feature_info
    shapes = [[1, c, 224 // r, 224 // r] for c, r in zip(features.channels(), features.reduction())]
    shapes.append([1, network.head_hidden_size])
    assert re.findall(r'^# (torch\.Size.*)$', text, re.MULTILINE) == [f'torch.Size({shape})' for shape in shapes]
    assert set(re.findall(r"create_model\('(.*?)'", ''.join(_snippets(text)))) == {f'hf-hub:{HUB_ORG}/{name}'}

    # The card of a model that timm has is for timm alone. Those of the others, and of folders, use timm_eca.
    local = official_card(name, 'downloaded')
    assert all('import timm_eca' in snippet for snippet in _snippets(local))
    assert 'pip install timm_eca' in local
    assert 'Two ways' not in local
    try:
        stock: Any = as_timm_model(network)
    except ModelError:
        assert all('import timm_eca' in snippet for snippet in _snippets(text))
        assert 'Two ways' not in text
    else:
        assert not any('timm_eca' in snippet for snippet in _snippets(text))
        assert f"timm's own `{stock.pretrained_cfg['architecture']}` with" in text


@pytest.mark.parametrize('provenance', PROVENANCES)
def test_card_of_a_conversion_of_the_authors_file(provenance: str):
    """The examples load the folder. On the Hub it is the card of `hub_cards/`, but for how the file is known."""
    name = f'eca_mobilenetv2.{TAG}'
    card = official_card(name, provenance)
    assert 'hf-hub:' not in card
    assert f'because {PROVENANCES[provenance]}.' in card
    pushed = point_to_repository(card.encode(), f'{HUB_ORG}/{name}').decode()
    assert (pushed == (CARDS / f'{name}.md').read_text()) == (provenance == 'downloaded')


def test_snippets_run(
        mobilenetv2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each snippet of a card, run by itself in the converted folder, prints what it says."""
    from PIL import Image

    folder = convert(mobilenetv2_file, provenance='downloaded').folder
    monkeypatch.chdir(folder)
    picture = tmp_path / 'picture.png'
    Image.new('RGB', (300, 260), (200, 60, 20)).save(picture)
    monkeypatch.setattr('urllib.request.urlopen', lambda url: picture.open('rb'))
    snippets = _snippets((folder / 'README.md').read_text())
    assert len(snippets) == 3
    for snippet in snippets:
        capsys.readouterr()
        exec(compile(snippet, 'card', 'exec'), {})
        assert capsys.readouterr().out.splitlines() == re.findall(r'^# (torch\.Size.*)$', snippet, re.MULTILINE)


def test_card_of_other_weights_claims_nothing(
        tmp_path: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """It says first that they are not known to be the authors'. On the Hub its example loads the repository."""
    state_dict = official_state_dict('eca_mobilenetv2_050', num_classes=0, in_chans=1)
    folder = convert(save_official(tmp_path / 'mine.pth.tar', state_dict), tag='mine').folder
    text = (folder / 'README.md').read_text()
    card = ModelCard(text)
    assert not card.data.eval_results
    assert card.data.datasets is None
    assert card.data.license is None
    assert 'top-1' not in text
    assert card.text.strip().splitlines()[2].startswith('These weights are not known to be those of ECA-Net\'s authors')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    [snippet] = _snippets(text)
    monkeypatch.chdir(folder)
    exec(compile(snippet, 'card', 'exec'), {})
    assert capsys.readouterr().out.splitlines() == ['torch.Size([1, 1280])']

    push_folder(folder, 'timm-eca/mine')
    pushed = hub.repos['timm-eca/mine'].head().files['README.md'].decode()
    assert "create_model('hf-hub:timm-eca/mine', pretrained=True)" in pushed
    assert 'local-dir' not in pushed
    assert (folder / 'README.md').read_text() == text


def test_card_of_exported_weights_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = create_model('eca_test_resnet', kernel_sizes=3)
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    metadata = make_metadata({}, source='file.pth', source_sha256='0' * 64)
    save_weights(model.state_dict(), tmp_path / 'folder' / 'model.safetensors', metadata)
    monkeypatch.setattr(export, '_compare', lambda *args: None)  # starts a process
    export.export_folder(tmp_path / 'folder', tmp_path / 'exported')
    text = ModelCard.load(tmp_path / 'exported' / 'README.md').text
    assert text.strip().splitlines()[2] == 'These weights are not known to be those of ECA-Net\'s authors.'
    assert f'converted from file.pth. Its SHA-256 is {"0" * 64}.' in text


@pytest.mark.parametrize(('architecture', 'origin', 'eca'), [
    ('eca_mobilenetv2_050', ('apache-2.0', 'timm/mobilenetv2_050.lamb_in1k'), True),
    ('test_resnet', (None, None), False),
])
def test_card_of_fine_tuned_weights(architecture: str, origin: tuple[str | None, str | None], eca: bool):
    """It names license and repository of the weights before the training. A model of timm needs no timm_eca."""
    model = create_model(architecture, num_classes=2, device='meta')
    config = {
        'architecture': architecture, 'label_names': ['cat', 'a|b'],
        'pretrained_cfg': {**model.pretrained_cfg, 'input_size': [3, 64, 64]}}
    card = ModelCard(finetuned_card(
        model, config, 'the pretrained weights', 'pets', 3, 2, {'loss': 0.1, 'top1': 87.5}, 8, 4,
        [('cat', 4, 87.5), ('a|b', 0, None)], 'timm-eca finetune pets --output mine', worst_pairs=[('cat', 'a|b', 1)],
        license=origin[0], base_model=origin[1]))
    assert (card.data.license, card.data.base_model) == origin
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [('Top-1 accuracy', 87.5)]
    for words in ('top-1 87.50 % on 4 validation', 'in 3 epochs',
                  '| class | images | recall (%) |\n| --- | --- | --- |\n| cat | 4 | 87.5 |', r'| a\|b | 0 | - |',
                  r'| cat | a\|b | 1 |'):
        assert words in card.text
    for words in ('pip install timm_eca', 'import timm_eca', '- eca', PAPER_NAME, 'ECA'):
        assert (words in card.content) == eca, words
