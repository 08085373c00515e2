"""timm's own form of models with ECA: the same logits without this package, and the way back."""
import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from helpers.families import twins_by_family
from helpers.networks import NoValues, image, kernel_sizes_of, randomize_norms, trained
from helpers.official_files import ENTRIES, golden, golden_input, official_state_dict
from timm.layers import EcaModule, freeze_batch_norm_2d
from timm.models import ByobNet, ResNet, create_model, save_for_hf

from timm_eca import add_attn, add_eca, as_timm_model, to_timm
from timm_eca.errors import ModelError
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.weights.key_maps import cut_kernels

TINY: dict[str, Any] = {'layers': (1, 1, 1, 1)}
# A model of each kind of block, and the sizes of the kernels that timm makes for it, by stage.
FORMS = {
    'eca_test_resnet': ({'kernel_sizes': (3, 1, 3, 3)}, (3, 3, 5, 3)),
    'eca_resnet50': ({**TINY, 'kernel_sizes': (3, 5, 5, 7)}, (5, 5, 5, 7)),
    'eca_resnext50_32x4d': (TINY, (5, 5, 5, 7)),
    'eca_resnetblur18': (TINY, (3, 5, 5, 5)),
    'eca_gernet_s': ({'kernel_sizes': 3}, (3, 3, 5, 5, 5)),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize('name', FORMS)
def test_logits_are_equal_and_the_way_back_is_exact(name: str):
    kwargs, timm_sizes = FORMS[name]
    model = trained(name, **kwargs)
    stock, logits = as_timm_model(model), model(image())
    assert type(stock) in (ResNet, ByobNet)
    assert not list(named_norm_attn(stock))
    assert len([m for m in stock.modules() if isinstance(m, EcaModule)]) == len(list(named_norm_attn(model)))
    assert logits.std() > 0
    assert torch.equal(stock(image()), logits)

    state_dict = to_timm(stock.state_dict())
    assert tuple(kernel_sizes_of(state_dict)) == timm_sizes
    assert equal(cut_kernels(state_dict, model.state_dict()), model.state_dict())
    # As they are.
    same = create_model(name, **{**kwargs, 'kernel_sizes': timm_sizes}).eval()
    same.load_state_dict(state_dict)
    assert torch.equal(same(image()), logits)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name != 'eca_resnet50_k3557' else name
    for name in ENTRIES if name in ('eca_resnet50_k3557', 'eca_resnet101_k3357', 'eca_resnet152_k3357')])
def test_the_published_architectures_give_the_golden_logits(name: str):
    variant, kernel_sizes = ENTRIES[name]
    model = create_model(variant, kernel_sizes=kernel_sizes).eval()
    model.load_state_dict(to_timm(official_state_dict(variant, kernel_sizes=kernel_sizes)))
    stock, (logits, _) = as_timm_model(model), golden(name)
    found = stock(golden_input())
    assert torch.equal(found, model(golden_input()))
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_models_of_add_eca():
    model = randomize_norms(create_model('resnet26d', **TINY, drop_path_rate=0.1)).eval()
    plain = model(image())
    add_eca(model, 3)
    assert torch.equal(as_timm_model(model)(image()), plain)
    for _, place in named_norm_attn(model):
        nn.init.normal_(place.attn.conv.weight)
    stock: Any = as_timm_model(model)
    assert torch.equal(stock(image()), model(image()))
    assert not torch.equal(stock(image()), plain)
    assert stock.pretrained_cfg == {**model.pretrained_cfg, 'architecture': 'resnet26d'}
    assert stock._model_args['block_args'] == {'attn_layer': 'eca'}
    assert stock._model_args['drop_path_rate'] == 0.1


def test_what_is_kept():
    """Training mode, frozen parameters, device, dtype, classes, channels, pooling; the source stays as it is."""
    model: Any = trained('eca_test_resnet', in_chans=1, num_classes=7, global_pool='max').double()
    model.reset_classifier(3)
    model.layer1[0].bn2.attn.requires_grad_(False)
    model.conv1[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    stock: Any = as_timm_model(model)
    assert torch.equal(stock(image(channels=1).double()), model(image(channels=1).double()))
    assert [name for name, p in stock.named_parameters() if not p.requires_grad] == [
        'conv1.0.weight', 'layer1.0.se.conv.weight']
    stock.train()
    stock(image(channels=1).double())
    nn.init.zeros_(stock.conv1[0].weight)
    assert equal(model.state_dict(), before)
    assert as_timm_model(model.train()).training
    assert {p.device.type for p in as_timm_model(model.to('meta')).parameters()} == {'meta'}
    mixed = trained('eca_resnetblur18', **TINY).bfloat16()
    for _, place in named_norm_attn(mixed):
        place.norm.float()
    kept = to_timm(as_timm_model(mixed).state_dict())
    assert {key: value.dtype for key, value in kept.items()} == {
        key: value.dtype for key, value in mixed.state_dict().items()}


def test_frozen_norms():
    model = freeze_batch_norm_2d(trained('eca_test_resnet'))
    stock = as_timm_model(model)
    found, wanted = to_timm(stock.state_dict()), model.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if not key.endswith('.conv.weight'))
    torch.testing.assert_close(stock(image()), model(image()))


@pytest.mark.parametrize(('name', 'kwargs', 'reason'), [
    ('eca_resnet18', {}, 'layer3.0.bn2 has an ECA kernel of 7 where timm\'s resnet18 makes 5'),
    ('eca_mobilenetv2', {}, 'timm\'s EfficientNet has no option for ECA behind the last norm of a block'),
    ('eca_seresnet50', {}, 'timm\'s seresnet50 with ECA has no layer1.0.se.fc1.weight'),
    ('eca_skresnet18', {}, 'timm\'s skresnet18 with ECA has tensors of other names or shapes'),
    ('eca_res2net50_26w_4s', {}, 'the blocks of timm\'s res2net50_26w_4s take no ECA'),
    ('eca_test_resnet', {'attn_layer': 'se_var2'}, 'layer1.0.bn2.attn is SeVar2, not ECA'),
    ('eca_test_resnet', {'features_only': True}, 'has no option for ECA'),
])
def test_models_without_the_form_are_refused(name: str, kwargs: dict[str, Any], reason: str):
    with pytest.raises(ModelError, match=re.escape(reason)) as e:
        as_timm_model(create_model(name, device='meta', **kwargs))
    assert '\n' not in str(e.value)


def test_models_without_eca_or_name_are_refused():
    with pytest.raises(ValueError, match='resnet18 has no ECA: give it ECA'):
        as_timm_model(create_model('resnet18', device='meta'))
    with pytest.raises(ValueError, match='ResNet is not the name of a model with ECA: make the model with timm'):
        as_timm_model(add_eca(ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1))))
    with pytest.raises(ValueError, match=r'layer1\.0\.bn2\.attn is SEModule'):
        as_timm_model(add_attn(create_model('test_resnet'), 'se', warm_start=False))


@pytest.mark.slow
def test_all_twins():
    """How many models have the form, as the README says. Those of other families have other classes."""
    having: dict[str, list[str]] = {}
    for family, names in twins_by_family().items():
        for name in names if family in ('resnet', 'sknet', 'byobnet', 'byoanet', 'mobilevit', 'resnest') else names[:1]:
            with contextlib.suppress(ModelError), NoValues():
                as_timm_model(create_model(name, device='meta'))
                having.setdefault(family, []).append(name)
    assert {family: len(names) for family, names in having.items()} == {'resnet': 41, 'sknet': 2, 'byobnet': 16}
    assert {'eca_resnet50', 'eca_resnet101', 'eca_resnet152'} < set(having['resnet'])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A stock model with ECA, and its folder."""
    torch.manual_seed(0)
    stock = randomize_norms(create_model('test_resnet', block_args={'attn_layer': 'eca'}, num_classes=5)).eval()
    save_for_hf(stock, tmp_path / 'stock', safe_serialization=True)
    return stock, tmp_path / 'stock'


def load_twin(state_dict: dict[str, torch.Tensor], **kwargs: Any) -> nn.Module:
    return create_model(
        'eca_test_resnet', pretrained=True, num_classes=5,
        pretrained_cfg_overlay={'state_dict': state_dict, 'num_classes': 5}, **kwargs).eval()


def test_stock_weights_become_the_twin(saved: tuple[nn.Module, Path]):
    stock, folder = saved
    sizes = kernel_sizes_of(to_timm(stock.state_dict()))
    twin = load_twin(stock.state_dict(), kernel_sizes=sizes)
    assert torch.equal(twin(image()), stock(image()))
    assert equal(as_timm_model(twin).state_dict(), stock.state_dict())
    twin = create_model(
        'eca_test_resnet', pretrained=True, num_classes=5, kernel_sizes=sizes,
        pretrained_cfg_overlay={'file': str(folder / 'model.safetensors'), 'num_classes': 5}).eval()
    assert torch.equal(twin(image()), stock(image()))


def test_kernels_are_cut_only_where_zero(saved: tuple[nn.Module, Path]):
    state_dict = saved[0].state_dict()
    sizes = kernel_sizes_of(to_timm(state_dict))
    key = next(key for key, value in state_dict.items() if key.endswith('.se.conv.weight') and value.shape[-1] == 5)
    with pytest.raises(ValueError, match=re.escape(f'create the model with kernel_sizes={sizes}')):
        load_twin(state_dict, kernel_sizes=3)
    for name, value in state_dict.items():
        if name.endswith('.se.conv.weight') and value.shape[-1] == 5:
            value[..., 0] = value[..., -1] = 0
    twin = load_twin(state_dict, kernel_sizes=3)
    assert torch.equal(twin(image()), saved[0](image()))
    state_dict[key][..., 0] = 1e-30
    with pytest.raises(ValueError, match='kernel_sizes='):
        load_twin(state_dict, kernel_sizes=3)


def test_parts_and_even_kernels_are_refused(saved: tuple[nn.Module, Path]):
    state_dict = saved[0].state_dict()
    key = 'layer2.0.se.conv.weight'
    sizes = kernel_sizes_of(to_timm(state_dict))
    without = {name: value for name, value in state_dict.items() if name != key}
    with pytest.raises(ValueError, match=re.escape('layer2.0.bn2')) as e:
        load_twin(without, kernel_sizes=sizes)
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='even') as e:
        load_twin({**state_dict, key: torch.zeros(1, 1, 4)}, kernel_sizes=sizes)
    assert '\n' not in str(e.value)


def test_other_models_keep_their_names():
    """Attention within a block is not ECA behind its last norm."""
    for name, kwargs in (
            ('efficientnet_b0', {'se_layer': 'eca'}), ('mobilevit_xxs', {'attn_layer': 'eca'}), ('seresnet50', TINY),
            ('resnet50', {**TINY, 'block_args': {'attn_layer': 'cbam'}}), ('eca_resnet26d', TINY)):
        model = create_model(name, device='meta', **kwargs)
        assert to_timm(model.state_dict()).keys() == model.state_dict().keys(), name
