"""ECA and other attentions in timm models: a warm start keeps the outputs, and the attention can learn from there."""
import copy
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from helpers.networks import FAMILY_MODELS, NoValues, block_kinds, image, randomize_norms, trained, unplaced_blocks
from huggingface_hub import constants
from timm.models import create_model, list_models

from timm_eca import add_attn, add_eca, remove_eca
from timm_eca.layers.attention import ATTENTIONS
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.models.insert import FAMILIES, insert_attn, twin_name

SMALL = 5_500_000  # larger models, by parameters, are built but not run
NAMES_TAKEN = ('resnet33ts', 'resnext26ts')  # timm has models of its own under the names of their twins


TWINS = list_models(module='eca_twins')


def test_registered_twins():
    assert len(TWINS) > 400
    assert not {twin_name(name) for name in NAMES_TAKEN} & set(TWINS)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_every_model(family: str):
    """The models with a place for ECA have a twin, and no others have one. All of their blocks are known.

    Small ones that have a kind of block that no smaller one has, or the smallest, are computed: logits and features
    with ECA, and weights after its removal.
    """
    names = [name for name in list_models(module=family) if not name.startswith(('eca_', 'ecares'))]
    sizes: dict[str, int] = {}
    kinds = {}
    for name in names:
        with NoValues():
            model = create_model(name, device='meta')
        size = sum(p.numel() for p in model.parameters())
        try:
            insert_attn(model, 'eca', 'adaptive')
        except ValueError:
            continue
        assert unplaced_blocks(model) == set(), name
        sizes[name], kinds[name] = size, block_kinds(model)
    assert list(sizes) == [name for name in names if timm.is_model(twin_name(name))]

    seen: set[tuple[type[nn.Module], ...]] = set()
    for name in sorted(sizes.keys() - {*NAMES_TAKEN}, key=lambda name: sizes[name]):
        if seen and (sizes[name] > SMALL or kinds[name] <= seen):
            continue
        seen |= kinds[name]
        model = trained(name, **{key: value for key, value in FAMILY_MODELS[family][1].items() if key == 'img_size'})
        # The attention layers of this family are made for one size of images.
        x = image(model.pretrained_cfg['input_size'][-1] if family == 'byoanet' else 64)
        with torch.no_grad():
            features = model.forward_features(x)
            logits = model.forward_head(features)
            gated = add_eca(copy.deepcopy(model))
            found = gated.forward_features(x)
            assert torch.equal(found, features), name
            assert torch.equal(gated.forward_head(found), logits), name
        removed, wanted = remove_eca(gated).state_dict(), model.state_dict()
        assert list(removed) == list(wanted)
        assert all(torch.equal(value, wanted[key]) for key, value in removed.items()), name


def test_warm_start_on_real_weights(shared: Path):
    """Plain ImageNet weights by torchvision's names, without a classifier, given as a file."""
    file = shared / 'data' / 'mobilenetv2_backbone.pt'
    overlay = {'file': str(file)}
    model = create_model('eca_mobilenetv2', pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).eval()
    plain = create_model('mobilenetv2_100', num_classes=0).eval()
    timm.models.load_checkpoint(plain, str(file), remap=True)
    with torch.inference_mode():
        assert torch.equal(model(image(224)), plain(image(224)))
        other = create_model('eca_mobilenetv2', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(other.forward_features(image()), plain.forward_features(image()))


def test_model_is_kept_and_recorded(tmp_path: Path):
    """The model is changed in place, keeps all it had, is saved as its twin, and is loaded again by name."""
    model = trained('regnety_002', num_classes=7, dtype=torch.float64)
    model.conv_tag = 'mine'
    weights = dict(model.named_parameters())
    logits = model(image().double())
    assert add_eca(model, [3, 5, 5, 7]) is model
    assert model.conv_tag == 'mine'
    kept = {name.replace('.norm.', '.'): p for name, p in model.named_parameters()}
    assert all(kept[name] is p for name, p in weights.items())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert model.default_cfg['architecture'] == 'eca_regnety_002'
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'eca_regnety_002'
    assert config['model_args']['kernel_sizes'] == [3, 5, 5, 7]
    loaded = create_model(f'local-dir:{tmp_path}', pretrained=True, dtype=torch.float64).eval()
    assert torch.equal(loaded(image().double()), logits)
    features = create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=(1, 2))
    assert len(features(image())) == 2

    remove_eca(model)
    assert model.default_cfg['architecture'] == 'regnety_002'
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert 'kernel_sizes' not in json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert torch.equal(create_model(f'local-dir:{tmp_path}', pretrained=True, dtype=torch.float64).eval()(
        image().double()), logits)


def test_tags_are_those_of_the_plain_models():
    for twin in TWINS:
        tags, twins = (
            {cfg.tag: (cfg.hf_hub_id, cfg.url) for cfg in timm.models.get_arch_pretrained_cfgs(name).values()}
            for name in (twin.removeprefix('eca_'), twin))
        assert twins == tags


def test_twin_gives_warm_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Plain weights of a folder give the whole model, one with another head, and a feature extractor."""
    base = 'fbnetc_100'
    plain = trained(base, bn_eps=1e-3)  # timm sets it for its weights, and so does the twin
    timm.models.save_for_hf(plain, str(tmp_path), safe_serialization=True)
    overlay = {'file': str(tmp_path / 'model.safetensors')}
    caplog.set_level(logging.INFO, logger='timm_eca')
    twin = create_model(twin_name(base), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert 'warm start' in caplog.text
    other = create_model(twin_name(base), pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    extractors = [
        create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay).eval()
        for name in (base, twin_name(base))]
    with torch.inference_mode():
        assert torch.equal(twin(image()), plain(image()))
        assert torch.equal(other.forward_features(image()), plain.forward_features(image()))
        assert all(torch.equal(a, b) for a, b in zip(*(extractor(image()) for extractor in extractors)))

    caplog.clear()
    timm.models.save_for_hf(twin, str(tmp_path), safe_serialization=True)
    again = create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert 'loaded as they are' in caplog.text
    with torch.inference_mode():
        assert torch.equal(again(image()), plain(image()))


def test_warm_start_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`'eca_resnet18.a1_in1k'` is timm's own file, from the cache that timm's model has filled."""
    plain = trained('resnet18')
    repo = tmp_path / 'models--timm--resnet18.a1_in1k'
    timm.models.save_for_hf(plain, str(repo / 'snapshots' / '0'), safe_serialization=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with torch.inference_mode():
        for name in ('resnet18.a1_in1k', 'eca_resnet18.a1_in1k'):
            assert torch.equal(create_model(name, pretrained=True).eval()(image()), plain(image()))


@pytest.mark.parametrize(('make', 'sentence'), [
    (lambda: add_eca(create_model('lcnet_050', device='meta')), 'one of these families of timm: resnet, hrnet'),
    (lambda: add_eca(create_model('vit_tiny_patch16_224', device='meta')), 'no residual block'),
    (lambda: add_eca(create_model('resnet33ts', device='meta')), 'timm_eca has no eca_resnet33ts'),
    (lambda: add_eca(create_model('eca_resnet18', device='meta')), 'has ECA already, in layer1.0'),
    (lambda: add_eca(create_model('ecaresnet26t', device='meta')), 'has ECA already, in layer1.0.se'),
    (lambda: add_attn(create_model('resnet18', device='meta'), 'sse'), 'use one of eca, eca_ns, se_var1'),
    (lambda: add_attn(create_model('resnet18', device='meta'), 'se_var1'), 'no parameters'),
    (lambda: add_eca(create_model('resnet18', device='meta'), (3, 3)), 'a sequence of 4'),
    (lambda: remove_eca(create_model('resnet18', device='meta')), 'no ECA to remove'),
    (lambda: remove_eca(trained('eca_resnet18')), 'depend on the input'),
])
def test_refusals(make, sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_refusal_leaves_the_model_as_it_was():
    model = trained('mobilenetv2_050')
    before = model.state_dict()
    with pytest.raises(ValueError, match='multiple of 16 channels in each block, and EfficientNet has blocks of 8: '):
        add_attn(model, 'se_gc')
    for block in model.blocks.modules():
        if isinstance(block, nn.BatchNorm2d):
            block.affine, block.weight, block.bias = False, None, None
    with pytest.raises(ValueError, match='no scale'):
        add_eca(model)
    assert not [*named_norm_attn(model)]
    assert set(model.state_dict()) <= set(before)
    add_eca(model, warm_start=False)
    assert model(image()).isfinite().all()


@pytest.mark.parametrize('attn', ATTENTIONS)
def test_attentions(attn: str, tmp_path: Path):
    """Each attention in ECA's places: warm start, gradient, the registered model, and a round trip by config.json."""
    twin = 'eca_test_resnet'
    plain = trained('test_resnet', num_classes=9)
    with torch.no_grad():
        logits = plain(image())
        if attn == 'se_var1':
            model = add_attn(plain, attn, warm_start=False)
            assert not torch.equal(model(image()), logits)
            timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
            assert torch.equal(create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(image()), model(image()))
            return
        model = add_attn(copy.deepcopy(plain), attn)
        assert torch.equal(model(image()), logits)
        made = create_model(twin, attn_layer=attn, num_classes=9, pretrained=True, pretrained_cfg_overlay={
            'state_dict': plain.state_dict(), 'num_classes': 9}).eval()
        assert torch.equal(made(image()), logits)
    model.train()(image()).square().mean().backward()
    last = [p for _, place in named_norm_attn(model)
            for name, p in place.attn.named_parameters() if name in ATTENTIONS[attn].zero_init_keys]
    assert sum(bool(p.grad.any()) for p in last) >= len(last) // 2
    model = randomize_norms(create_model(twin, attn_layer=attn, num_classes=9)).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['attn_layer'] == attn
    with torch.no_grad():
        assert torch.equal(create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(image()), model(image()))


@pytest.mark.parametrize(('attn', 'per_layer'), [
    ('eca', lambda c, k: k), ('eca_ns', lambda c, k: k * c), ('se_var1', lambda c, k: 0), ('se_var2', lambda c, k: c),
    ('se_var3', lambda c, k: c * c), ('se_gc', lambda c, k: c * c // 16), ('ceca', lambda c, k: k),
    ('se', lambda c, k: 2 * c * c // 16 + c // 16 + c),  # timm's has biases, the paper's has none
])
def test_parameters_of_the_attentions(attn: str, per_layer):
    """The paper's table 2, to the unit."""
    model = create_model('eca_resnet50', attn_layer=attn, kernel_sizes=3, device='meta')
    for _, place in named_norm_attn(model):
        assert sum(p.numel() for p in place.attn.parameters()) == per_layer(place.norm.num_features, 3)


@pytest.mark.parametrize('attn', ['eca_ns', 'se_var2', 'se_var3', 'se_gc'])
def test_peers_compute_the_papers_formulas(attn: str):
    """Gates from their definition, one channel at a time."""
    layer = ATTENTIONS[attn].make(32, 5).double()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    y = x.mean((2, 3))
    weight = next(layer.parameters()).detach()
    matrix = torch.zeros(32, 32, dtype=torch.float64)
    for i in range(32):
        for j in range(32):
            if attn == 'se_var2':
                matrix[i, j] = weight[i] if i == j else 0
            elif attn == 'se_var3':
                matrix[i, j] = weight[i, j]
            elif attn == 'se_gc':  # 16 groups of 2 channels
                matrix[i, j] = weight[i, j % 2, 0] if i // 2 == j // 2 else 0
            elif abs(i - j) <= 2:
                matrix[i, j] = weight[i, 0, j - i + 2]
    torch.testing.assert_close(layer(x), x * (y @ matrix.T).sigmoid()[..., None, None])


@pytest.mark.parametrize('make', [
    lambda: timm.layers.convert_splitbn_model(trained('test_resnet')),
    lambda: create_model('resnet18', norm_layer='groupnorm', zero_init_last=False),
    lambda: create_model('resnet18', norm_layer='layernorm2d', zero_init_last=False),
    lambda: create_model('efficientnet_b1_pruned'),
])
def test_other_norms_and_wrapped_models(make):
    model = make().eval()
    with torch.no_grad():
        logits = model(image())
        assert torch.equal(add_eca(model)(image()), logits)


def test_flags_of_the_parameters_are_kept():
    model = create_model('resnet18')
    for p in model.layer1.parameters():
        p.requires_grad = False
    model.layer2.eval()
    model.layer3[0].bn2.eval()  # a frozen norm in a block that trains
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    add_eca(model)
    assert {
        name.replace('.norm.', '.'): p.requires_grad for name, p in model.named_parameters() if '.attn.' not in name
    } == flags
    modes = [[m.training for m in (p, p.norm, p.attn)] for p in (layer[0].bn2 for layer in (
        model.layer1, model.layer2, model.layer3))]
    assert modes == [[True] * 3, [False] * 3, [True, False, True]]


@pytest.mark.parametrize('kernel_sizes', [np.int64(3), [np.int64(k) for k in (3, 5, 7, 9)]])
def test_numbers_of_numpy_as_kernel_sizes(kernel_sizes, tmp_path: Path):
    model = add_eca(create_model('resnet18'), kernel_sizes)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = json.loads((tmp_path / 'config.json').read_text())['model_args']['kernel_sizes']
    assert np.array_equal(loaded, kernel_sizes)
