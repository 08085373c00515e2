"""One model of each family: a warm start keeps the outputs, and tools for timm's models work on those with ECA."""
import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
from helpers.networks import FAMILY_MODELS, image, trained, unplaced_blocks
from timm.layers import FrozenBatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models import create_model
from timm.models.resnet import BasicBlock
from torch.fx.experimental.optimization import fuse
from torchvision.ops.misc import FrozenBatchNorm2d

from timm_eca import add_eca, gates, remove_eca
from timm_eca.layers.norm_attn import NormAttn, named_norm_attn
from timm_eca.models.insert import FAMILIES, twin_name
from timm_eca.models.sites import LAST_NORMS

QUICK = ('resnet', 'efficientnet')  # small, with the blocks that most models have
quick_families = pytest.mark.parametrize('case', QUICK, indirect=True)


class Case(NamedTuple):
    """A model of a family, without ECA and with random ECA, and their logits for an image."""
    family: str
    plain: nn.Module
    plain_logits: torch.Tensor
    twin: nn.Module
    logits: torch.Tensor


@pytest.fixture(scope='module', params=[
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])
def case(request: pytest.FixtureRequest) -> Case:
    name, kwargs = FAMILY_MODELS[request.param]
    plain, twin = trained(name, **kwargs), trained(twin_name(name), **kwargs)
    with torch.no_grad():
        return Case(request.param, plain, plain(image()), twin, twin(image()))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def places(model: nn.Module) -> list[NormAttn]:
    return [place for _, place in named_norm_attn(model)]


def attention(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if '.attn.conv.' in key}


def batch_norms(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def same_attention(model: nn.Module, other: nn.Module) -> bool:
    """Whether the attention layers of two models are of one type, with the same weights in the same places."""
    found, wanted = attention(model), attention(other)
    types = [[type(place.attn) for place in places(m)] for m in (model, other)]
    return types[0] == types[1] and list(found) == list(wanted) and all(
        torch.equal(found[key], value) for key, value in wanted.items())


def works(function: Callable[[], object]) -> bool:
    try:
        function()
    except Exception:  # timm's own model can't do it
        return False
    return True


@quick_families
def test_warm_start(case: Case):
    """Bit-equal logits and features, of one image and of three, in both memory formats; the same weights after it."""
    model = add_eca(copy.deepcopy(case.plain))
    x = torch.cat([image(), image().flip(3)])[:3]
    for n, memory_format in itertools.product((1, 3), (torch.contiguous_format, torch.channels_last)):
        images = x[:n].to(memory_format=memory_format)
        assert torch.equal(model(images), case.plain(images))
    assert torch.equal(model.forward_features(x), case.plain.forward_features(x))
    removed, wanted = remove_eca(model).state_dict(), case.plain.state_dict()
    assert list(removed) == list(wanted)
    assert all(torch.equal(removed[key], value) for key, value in wanted.items())


def test_twin_from_plain_weights(case: Case):
    """The registered model as a classifier, and as the kind of feature extractor that timm makes of the plain one."""
    name, kwargs = FAMILY_MODELS[case.family]
    weights = {'pretrained': True, 'pretrained_cfg_overlay': {'state_dict': case.plain.state_dict()}, **kwargs}
    assert torch.equal(create_model(twin_name(name), **weights).eval()(image()), case.plain_logits)
    plain, twin = (create_model(n, features_only=True, **weights).eval() for n in (name, twin_name(name)))
    assert type(twin) is type(plain)
    assert twin.feature_info.get_dicts() == plain.feature_info.get_dicts()
    features, wanted = twin(image()), plain(image())
    assert len(features) == len(wanted)
    assert all(map(torch.equal, features, wanted))
    assert places(twin)


@quick_families
def test_folder(case: Case, tmp_path: Path):
    """A model with ECA goes through `save_for_hf`: in whole, with another head, and as a feature extractor."""
    name, kwargs = FAMILY_MODELS[case.family]
    model = add_eca(trained(name, num_classes=5, **kwargs))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    folder = f'local-dir:{tmp_path}'
    assert torch.equal(create_model(folder, pretrained=True).eval()(image()), model(image()))
    other = create_model(folder, pretrained=True, num_classes=3).eval()
    assert torch.equal(other.forward_features(image()), model.forward_features(image()))
    assert other(image()).shape == (2, 3)
    assert all(f.isfinite().all() for f in create_model(folder, pretrained=True, features_only=True).eval()(image()))


@quick_families
@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_sync_batch_norm(case: Case, convert: Callable[[nn.Module], nn.Module]):
    norms = [type(place.norm) for place in places(case.twin)]
    model = convert(copy.deepcopy(case.twin))
    assert same_attention(model, case.twin)
    for place, norm in zip(places(model), norms):
        assert isinstance(place.norm, nn.SyncBatchNorm) == issubclass(norm, nn.BatchNorm2d)
    # torch's converter drops the activations of timm's own norms.
    if torch.equal(convert(copy.deepcopy(case.plain))(image()), case.plain_logits):
        assert torch.equal(model(image()), case.logits)
    converted = convert(add_eca(copy.deepcopy(case.plain)))
    assert len(gates(converted, image())) == len(norms)
    wanted = convert(copy.deepcopy(case.plain))(image())
    assert torch.equal(converted(image()), wanted)
    assert torch.equal(remove_eca(converted)(image()), wanted)


@quick_families
def test_frozen_batch_norm(case: Case):
    norms = [type(place.norm) for place in places(case.twin)]
    model = freeze_batch_norm_2d(copy.deepcopy(case.twin))
    assert same_attention(model, case.twin)
    for place, norm in zip(places(model), norms):
        frozen = isinstance(place.norm, FrozenBatchNorm2d | FrozenBatchNormAct2d)
        assert frozen == issubclass(norm, nn.BatchNorm2d)
    torch.testing.assert_close(model(image()), case.logits, rtol=1e-3, atol=1e-3 * case.logits.abs().max().item())
    thawed = unfreeze_batch_norm_2d(model)
    assert [type(place.norm) for place in places(thawed)] == norms
    assert same_attention(thawed, case.twin)
    assert {key: value.shape for key, value in thawed.state_dict().items() if 'num_batches' not in key} == {
        key: value.shape for key, value in case.twin.state_dict().items() if 'num_batches' not in key}

    frozen = freeze_batch_norm_2d(copy.deepcopy(case.plain))
    wanted = frozen(image())
    frozen = add_eca(frozen)
    assert torch.equal(frozen(image()), wanted)
    assert len(gates(frozen, image())) == len(norms)
    assert torch.equal(remove_eca(frozen)(image()), wanted)


@quick_families
def test_copies(case: Case):
    for model in (copy.deepcopy(case.twin), pickle.loads(pickle.dumps(case.twin))):
        assert torch.equal(model(image()), case.logits)
        assert same_attention(model, case.twin)


@quick_families
def test_fusion_of_convolutions_and_norms(case: Case):
    if not works(lambda: torch.fx.symbolic_trace(case.plain)):
        pytest.skip('timm\'s model can\'t be traced')
    model, x = copy.deepcopy(case.twin).double(), image().double()
    assert torch.equal(torch.fx.symbolic_trace(case.twin)(image()), case.logits)
    fused = fuse(model)
    assert {name.removesuffix('.norm') for name in batch_norms(fused)} == batch_norms(fuse(case.plain))
    assert attention(fused).keys() == attention(model).keys()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9 * model(x).abs().max().item())
    # A traced graph has lost the places of the attention.
    with pytest.raises(ValueError, match='GraphModule has no ECA'):
        remove_eca(fused)


def test_reparameterization():
    """timm fuses RepVit's norms into its convolutions; the attention behind them is kept."""
    name, kwargs = FAMILY_MODELS['repvit']
    plain, twin = trained(name, **kwargs), trained(twin_name(name), **kwargs)
    wanted, gate_count = twin(image()), len(gates(twin, image()))
    fused = timm.utils.reparameterize_model(twin)
    assert not batch_norms(fused)
    torch.testing.assert_close(fused(image()), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert same_attention(fused, twin)
    assert len(gates(fused, image())) == gate_count
    warm = timm.utils.reparameterize_model(add_eca(copy.deepcopy(plain)))
    wanted = warm(image())
    assert torch.equal(remove_eca(warm)(image()), wanted)
    torch.testing.assert_close(wanted, plain(image()), rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_position_embeddings_of_another_size():
    """timm's changes to a checkpoint of the plain model are made for the one with ECA, too."""
    name, kwargs = FAMILY_MODELS['vision_transformer_hybrid']
    state_dict = trained(name, **kwargs).state_dict()
    plain, twin = (
        create_model(n, pretrained=True, pretrained_cfg_overlay={'state_dict': dict(state_dict)}, **{
            **kwargs, 'img_size': 96}).eval() for n in (name, twin_name(name)))
    assert torch.equal(twin(image(96)), plain(image(96)))


def test_norm_that_was_fused_away_is_refused():
    model = add_eca(trained('resnet18'))
    block = model.layer1[0]
    block.conv2 = torch.nn.utils.fuse_conv_bn_eval(block.conv2, block.bn2.norm)
    block.bn2.norm = nn.Identity()
    before = model(image())
    with pytest.raises(ValueError, match=r'layer1\.0\.bn2\.norm has no scale'):
        remove_eca(model)
    assert torch.equal(model(image()), before)
    assert len(gates(model, image())) == 8


def test_each_tensor_has_one_owner(case: Case):
    """A tensor that a module shows as an attribute is the module's own parameter or buffer, and no other module's."""
    owners = {id(t): m for m in case.twin.modules() for t in (*m._parameters.values(), *m._buffers.values())
              if t is not None}
    shown = [(m, getattr(m, name)) for m in case.twin.modules() for name in dir(m) if name != 'T_destination']
    assert not [m for m, value in shown if isinstance(value, torch.Tensor) and owners.get(id(value)) is not m]


def test_unknown_block_is_noticed(monkeypatch: pytest.MonkeyPatch):
    assert unplaced_blocks(create_model('eca_test_resnet', device='meta')) == set()
    monkeypatch.delitem(LAST_NORMS, BasicBlock)
    assert unplaced_blocks(create_model('test_resnet', device='meta')) == {'BasicBlock', 'Bottleneck'}
