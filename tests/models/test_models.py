"""timm's generic checks of models, over every registered name."""
import copy
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from helpers.networks import image, randomize_norms
from timm.layers import BlurPool2d
from timm.models import create_model, group_modules, list_models

import timm_eca
from timm_eca import EfficientChannelAttention
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.models.insert import insert_attn

ROOT = Path(__file__).parents[2]
BASES = {
    'eca_resnet18': 'resnet18', 'eca_resnet34': 'resnet34', 'eca_resnet50': 'resnet50', 'eca_resnet101': 'resnet101',
    'eca_resnet152': 'resnet152', 'eca_resnext50_32x4d': 'resnext50_32x4d', 'eca_wide_resnet50_2': 'wide_resnet50_2',
    'eca_mobilenetv2': 'mobilenetv2_100', 'eca_mobilenetv2_050': 'mobilenetv2_050',
    'eca_mobilenetv2_140': 'mobilenetv2_140',
}
SMALL = ['eca_resnet18', 'eca_mobilenetv2_050']
KINDS = ['eca_resnet18', 'eca_resnet50', 'eca_mobilenetv2_050']  # one of each class of blocks
LARGE = ['eca_resnet34', 'eca_resnet101', 'eca_resnet152', 'eca_resnext50_32x4d', 'eca_wide_resnet50_2']
every_model = pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in BASES])
small_models = pytest.mark.parametrize('name', SMALL)


def test_registered_names_and_modules():
    assert set(list_models(module=['eca_resnet', 'eca_mobilenetv2'])) == set(BASES)
    assert not set(list_models(module=['resnet', 'efficientnet'])) & set(BASES)


@every_model
def test_forward_and_backward(name: str):
    """Logits, and a gradient for every parameter."""
    model = randomize_norms(create_model(name, num_classes=42)).train()
    logits = model(image())
    assert logits.shape == (2, 42)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(place.attn.conv.weight.grad.count_nonzero() for _, place in named_norm_attn(model))


@every_model
def test_default_cfg(name: str):
    model = create_model(name, device='meta')
    cfg = model.default_cfg
    assert cfg['architecture'] == name
    state_dict = model.state_dict()
    assert f'{cfg["first_conv"]}.weight' in state_dict
    assert f'{cfg["classifier"]}.weight' in state_dict
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    features = model.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert timm.data.resolve_model_data_config(model)['input_size'] == cfg['input_size']


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


@every_model
def test_parameters_are_the_plain_models_and_ecas(name: str):
    """The plain model's state dict in its order, each block's gate next to its last norm."""
    model = create_model(name, device='meta')
    keys = list(model.state_dict())
    plain = create_model(BASES[name], device='meta').state_dict()
    assert [key.replace('.norm.', '.') for key in keys if '.attn.' not in key] == list(plain)
    places = [norm for norm, _ in named_norm_attn(model)]
    for norm in places:
        gate = keys.index(f'{norm}.attn.conv.weight')
        assert keys[gate - 1] == f'{norm}.norm.num_batches_tracked'
    assert len(places) == sum(isinstance(module, EfficientChannelAttention) for module in model.modules())
    assert len(places) == len(keys) - len(plain) > 0


@pytest.mark.parametrize(('name', 'kwargs'), [
    *(pytest.param(name, {}, marks=pytest.mark.slow) if name in LARGE else (name, {}) for name in BASES),
    *((name, kwargs) for name in KINDS for kwargs in (
        {'out_indices': (1, 3)}, {'out_indices': [-1]}, {'output_stride': 8}, {'output_stride': 16},
        {'feature_cls': 'list'}, {'feature_cls': 'dict'}, {'feature_cls': 'hook'}, {'feature_cls': 'getter'})),
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
    assert model.default_cfg.keys() - {'hf_hub_filename'} >= {'architecture', 'input_size', 'mean', 'std'}
    assert 'classifier' not in model.default_cfg
    x = torch.empty(2, 3, 64, 64, device='meta')
    outputs, wanted = model(x), plain(x)
    if isinstance(outputs, dict):
        outputs, wanted = list(outputs.values()), list(wanted.values())
    assert [o.shape for o in outputs] == [w.shape for w in wanted]


@small_models
def test_intermediates_are_what_the_blocks_put_out(name: str):
    model = randomize_norms(create_model(name)).eval()
    hooked: list[torch.Tensor] = []
    for info in model.feature_info:
        model.get_submodule(info['module']).register_forward_hook(lambda m, i, output: hooked.append(output.clone()))
    with torch.inference_mode():
        final, intermediates = model.forward_intermediates(image())
        assert len(intermediates) == 5
        assert all(torch.equal(a, b) for a, b in zip(intermediates, hooked, strict=True))
        assert torch.equal(final, model.forward_features(image()))
        wanted = model.forward_intermediates(image(), indices=[0, 2], intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(wanted, (intermediates[0], intermediates[2]))] == [True, True]
        model.prune_intermediate_layers([0, 2])
        pruned = model.forward_intermediates(image(), indices=[0, 2], intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(pruned, wanted, strict=True)] == [True, True]
    assert len([*named_norm_attn(model)]) < len([*named_norm_attn(create_model(name, device='meta'))])


@every_model
def test_groups(name: str):
    """Each gate is in its block's group, for layer decay."""
    model = create_model(name, device='meta')
    groups = group_modules(model, model.group_matcher(coarse=False), reverse=True)
    by_module = {module: group for group, modules in groups.items() for module in modules} \
        if isinstance(next(iter(groups.values())), list) else groups
    for norm, _ in named_norm_attn(model):
        assert by_module[f'{norm}.attn.conv'] == by_module[f'{norm}.norm']


@small_models
def test_grad_checkpointing(name: str):
    model = randomize_norms(create_model(name)).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image()).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@small_models
@pytest.mark.parametrize('kwargs', [
    {'in_chans': 1}, {'drop_rate': 0.5}, {'drop_path_rate': 0.5}, {'output_stride': 8}, {'act_layer': 'silu'},
    {'norm_layer': 'batchnorm2d'}, {'kernel_sizes': 9}, {'kernel_sizes': 'adaptive'}, {'scriptable': True},
], ids=str)
def test_arguments_of_the_family(name: str, kwargs: dict):
    model = randomize_norms(create_model(name, **kwargs)).train()
    output = model(image(channels=kwargs.get('in_chans', 3)))
    assert output.isfinite().all()
    output.sum().backward()
    if 'output_stride' in kwargs:
        assert model.forward_features(image()).shape[-1] == 8
    if 'act_layer' in kwargs:
        assert any(isinstance(module, nn.SiLU) for module in model.modules())
    if 'drop_path_rate' in kwargs:
        assert not torch.equal(model(image()), model(image()))


def test_group_norm_and_zero_init():
    model = create_model('eca_resnet18', norm_layer='groupnorm', zero_init_last=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(image()).isfinite().all()
    for zero in (True, False):
        model = create_model('eca_resnet18', zero_init_last=zero)
        assert {bool(place.norm.weight.count_nonzero()) for _, place in named_norm_attn(model)} == {not zero}


@every_model
def test_device_and_dtype(name: str):
    assert {p.device.type for p in create_model(name, device='meta').parameters()} == {'meta'}
    with torch.device('meta'):
        assert {p.device.type for p in create_model(name).parameters()} == {'meta'}
    dtypes = {p.dtype for p in create_model(name, dtype=torch.bfloat16, device='meta').parameters()}
    assert dtypes == {torch.bfloat16}


@small_models
@pytest.mark.parametrize('kernel_sizes', [5, 'adaptive', 'sequence'])
def test_kernel_sizes_round_trip_through_config(name: str, kernel_sizes, tmp_path: Path):
    if kernel_sizes == 'sequence':
        kernel_sizes = [9, 7, 5, 3] if name == 'eca_resnet18' else (9, 7, 5, 3, 1, 3, 5)
    model = randomize_norms(create_model(name, kernel_sizes=kernel_sizes, num_classes=6)).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(image()), model(image()))


@pytest.mark.parametrize(('base', 'kwargs'), [
    ('resnet18', {'aa_layer': BlurPool2d, 'drop_path_rate': 0.5, 'drop_block_rate': 0.5}),
    ('resnet26', {'block_args': {'attn_layer': 'se'}, 'drop_path_rate': 0.5}),
    ('mobilenetv2_050', {'drop_path_rate': 0.5}),
    ('mobilenetv2_050', {'se_layer': 'se', 'aa_layer': 'avg'}),
    ('res2net50_14w_8s', {'drop_path_rate': 0.5}),
    ('regnety_002', {'drop_path_rate': 0.5}),
    ('rexnet_100', {'drop_path_rate': 0.5}),
    ('efficientnet_es', {'drop_path_rate': 0.5}),
    ('mobilenetv4_conv_small', {'drop_path_rate': 0.5}),
], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_blocks_compute_what_timms_do(base: str, kwargs: dict, training: bool):
    """Without their gates the blocks are timm's, bit for bit."""
    plain = randomize_norms(create_model(base, **kwargs)).train(training)
    model = insert_attn(copy.deepcopy(plain), 'eca', 3)
    count = 0
    for _, place in named_norm_attn(model):
        place.attn = nn.Identity()
        count += 1
    assert count > 3
    outputs = []
    for network in (plain, model):
        torch.manual_seed(0)
        outputs.append(network(image()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize('code', [
    pytest.param(
        'import timm_eca; import {other}; import timm_eca, importlib; importlib.reload(timm_eca)',
        marks=pytest.mark.slow),
    'import timm; timm.create_model("test_resnet"); import {other}; import timm_eca; '
    'timm.create_model("eca_test_resnet")',
])
def test_import_is_quiet(code: str):
    """Before and after transformers, where it is installed, and more than once."""
    code = code.format(other='transformers' if importlib.util.find_spec('transformers') else 'timm')
    done = subprocess.run(
        [sys.executable, '-W', 'error:::timm', '-W', 'error:::timm_eca', '-c', code], capture_output=True, text=True,
        cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, '')


def test_reload_in_process():
    before = set(list_models('eca_*'))
    importlib.reload(timm_eca)
    assert set(list_models('eca_*')) == before
