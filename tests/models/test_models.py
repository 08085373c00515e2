"""timm's generic checks of models, over every registered name."""
import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from helpers.networks import image, randomize_norms
from timm.models import create_model, group_modules, list_models

from timm_eca.layers.norm_attn import named_norm_attn

ROOT = Path(__file__).parents[2]
BASES = {
    'eca_resnet18': 'resnet18', 'eca_resnet34': 'resnet34', 'eca_resnet50': 'resnet50', 'eca_resnet101': 'resnet101',
    'eca_resnet152': 'resnet152', 'eca_resnext50_32x4d': 'resnext50_32x4d', 'eca_wide_resnet50_2': 'wide_resnet50_2',
    'eca_mobilenetv2': 'mobilenetv2_100', 'eca_mobilenetv2_050': 'mobilenetv2_050',
    'eca_mobilenetv2_140': 'mobilenetv2_140',
}
SMALL = ['eca_resnet18', 'eca_mobilenetv2_050']
KINDS = ['eca_resnet18', 'eca_resnet50', 'eca_mobilenetv2_050']  # one of each class of blocks
small_models = pytest.mark.parametrize('name', SMALL)


def test_registered_names_and_modules():
    assert set(list_models(module=['eca_resnet', 'eca_mobilenetv2'])) == set(BASES)
    assert not set(list_models(module=['resnet', 'efficientnet'])) & set(BASES)


@small_models
def test_forward_and_backward(name: str):
    """Logits, and a gradient for every parameter."""
    model = randomize_norms(create_model(name, num_classes=42)).train()
    logits = model(image(32))
    assert logits.shape == (2, 42)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(place.attn.conv.weight.grad.count_nonzero() for _, place in named_norm_attn(model))


@pytest.mark.parametrize('name', BASES)
def test_config_tensors_and_groups(name: str):
    """The plain model's config and state dict in its order, and each gate next to its norm, in its block's group."""
    with torch.device('meta'):
        model = create_model(name, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    cfg, keys = model.default_cfg, list(model.state_dict())
    assert cfg['architecture'] == name
    assert f'{cfg["first_conv"]}.weight' in keys
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    features = model.forward_features(torch.empty(1, *cfg['input_size'], dtype=torch.bfloat16, device='meta'))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])

    plain = create_model(BASES[name], device='meta').state_dict()
    assert [key.replace('.norm.', '.') for key in keys if '.attn.' not in key] == list(plain)
    places = [norm for norm, _ in named_norm_attn(model)]
    assert len(places) == len(keys) - len(plain) > 0
    groups = group_modules(model, model.group_matcher(coarse=False), reverse=True)
    by_module = {module: group for group, modules in groups.items() for module in modules} \
        if isinstance(next(iter(groups.values())), list) else groups
    for norm in places:
        assert keys[keys.index(f'{norm}.attn.conv.weight') - 1] == f'{norm}.norm.num_batches_tracked'
        assert by_module[f'{norm}.attn.conv'] == by_module[f'{norm}.norm']


@pytest.mark.parametrize('name', KINDS)
def test_head(name: str):
    """forward_head, reset_classifier, num_classes=0 and no pooling."""
    model = create_model(name, device='meta')
    x = torch.empty(2, 3, 64, 64, device='meta')
    features = model.forward_features(x)
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape
    model.reset_classifier(7, 'max')
    assert model(x).shape == (2, 7)
    assert create_model(name, num_classes=0, device='meta')(x).shape == (2, model.num_features)
    assert create_model(name, num_classes=0, global_pool='', device='meta')(x).shape == features.shape


@pytest.mark.parametrize(('name', 'kwargs'), [
    (name, kwargs) for name in SMALL for kwargs in (
        {}, {'out_indices': (1, 3)}, {'out_indices': [-1]}, {'output_stride': 8},
        {'feature_cls': 'list'}, {'feature_cls': 'dict'}, {'feature_cls': 'hook'}, {'feature_cls': 'getter'})
], ids=str)
def test_features_are_the_plain_models(name: str, kwargs: dict):
    """The same extractor, channels, reductions, shapes and keys as timm's model without ECA."""
    if kwargs.get('feature_cls') in ('list', 'dict') and name.startswith('eca_mobilenetv2'):
        kwargs = {**kwargs, 'feature_cfg': {'flatten_sequential': True}}  # timm's MobileNetV2 needs it, too
    model, plain = (
        create_model(n, features_only=True, device='meta', **copy.deepcopy(kwargs)) for n in (name, BASES[name]))
    assert type(model) is type(plain)
    assert model.feature_info.channels() == plain.feature_info.channels()
    assert model.feature_info.reduction() == plain.feature_info.reduction()
    assert {key.replace('.norm.', '.') for key in model.state_dict() if '.attn.' not in key} == set(plain.state_dict())
    assert 'classifier' not in model.default_cfg
    x = torch.empty(2, 3, 64, 64, device='meta')
    outputs, wanted = model(x), plain(x)
    if isinstance(outputs, dict):
        outputs, wanted = list(outputs.values()), list(wanted.values())
    assert [o.shape for o in outputs] == [w.shape for w in wanted]


@small_models
def test_arguments_of_the_family(name: str):
    model = randomize_norms(create_model(
        name, in_chans=1, drop_rate=0.5, drop_path_rate=0.5, output_stride=8, act_layer='silu',
        norm_layer='batchnorm2d')).train()
    x = image(channels=1)
    model(x).sum().backward()
    assert model.forward_features(x).shape[-1] == 8
    assert any(isinstance(module, nn.SiLU) for module in model.modules())
    assert not torch.equal(model(x), model(x))


def test_group_norm_and_zero_init():
    model = create_model('eca_resnet18', norm_layer='groupnorm', zero_init_last=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(image()).isfinite().all()
    for zero in (True, False):
        model = create_model('eca_resnet18', zero_init_last=zero)
        assert {bool(place.norm.weight.count_nonzero()) for _, place in named_norm_attn(model)} == {not zero}


@pytest.mark.parametrize('kernel_sizes', [5, 'adaptive', (9, 7, 5, 3, 1, 3, 5)])
def test_kernel_sizes_round_trip_through_config(kernel_sizes, tmp_path: Path):
    model = randomize_norms(create_model('eca_mobilenetv2_050', kernel_sizes=kernel_sizes, num_classes=6)).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(image()), model(image()))


@pytest.mark.slow
def test_import_is_quiet():
    """Before and after transformers, where it is installed, and more than once."""
    other = 'transformers' if importlib.util.find_spec('transformers') else 'timm'
    code = (
        f'import timm; timm.create_model("test_resnet"); import {other}; import timm_eca; '
        'timm.create_model("eca_test_resnet"); import importlib; importlib.reload(timm_eca)')
    done = subprocess.run(
        [sys.executable, '-W', 'error:::timm', '-W', 'error:::timm_eca', '-c', code], capture_output=True, text=True,
        cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, '')
