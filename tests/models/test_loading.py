"""Every way to load weights into a model with ECA: plain weights give a warm start, its own are loaded as they are."""
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from helpers.networks import FAMILY_MODELS, image, trained
from timm.models import create_model, load_checkpoint

from timm_eca import add_attn, remove_eca, to_official
from timm_eca.layers.attention import ATTENTIONS
from timm_eca.layers.norm_attn import NormAttn

State = dict[str, torch.Tensor]


def fresh(**kwargs: Any) -> nn.Module:
    return create_model('eca_test_resnet', **kwargs).eval()


def load(model: nn.Module, state_dict: State, **kwargs: Any) -> nn.Module:
    assert str(model.load_state_dict(state_dict, **kwargs)) == '<All keys matched successfully>'
    return model


def on_meta(state_dict: State) -> nn.Module:
    return load(fresh(device='meta'), state_dict, assign=True)


def from_file(state_dict: State, path: Path, load: Callable[[str], nn.Module]) -> nn.Module:
    torch.save({'state_dict': {f'module.{key}': value for key, value in state_dict.items()}}, path)
    return load(str(path))


def into(model: nn.Module, file: str) -> nn.Module:
    load_checkpoint(model, file)
    return model


WAYS: dict[str, Callable[[State, Path], nn.Module]] = {
    'strict': lambda state, path: load(fresh(), state),
    'not strict': lambda state, path: load(fresh(), state, strict=False),
    'assign': lambda state, path: load(fresh(), state, assign=True),
    'meta': lambda state, path: on_meta(state),
    'deepcopy': lambda state, path: load(copy.deepcopy(fresh()), state),
    'pickle': lambda state, path: load(pickle.loads(pickle.dumps(fresh())), state),
    'average': lambda state, path: load(timm.utils.ModelEmaV3(fresh()).module, state),
    'compiled': lambda state, path: load(torch.compile(fresh(), backend='eager')._orig_mod, state),  # type: ignore
    'checkpoint_path': lambda state, path: from_file(state, path, lambda file: fresh(checkpoint_path=file)),
    'load_checkpoint': lambda state, path: from_file(state, path, lambda file: into(fresh(), file)),
    'overlay': lambda state, path: from_file(state, path, lambda file: fresh(
        pretrained=True, pretrained_cfg_overlay={'file': file})),
}


@pytest.mark.parametrize('way', WAYS)
def test_plain_weights_and_own_weights(way: str, tmp_path: Path):
    plain, own = trained('test_resnet'), trained('eca_test_resnet')
    with torch.no_grad():
        for model in (plain, own):
            given = model.state_dict()
            before = {key: value.clone() for key, value in given.items()}
            loaded = WAYS[way](given, tmp_path / 'weights.pth')
            assert torch.equal(loaded(image()), model(image()))
            assert list(loaded.state_dict()) == list(own.state_dict())
            assert list(given) == list(before)
            assert all(torch.equal(given[key], value) for key, value in before.items())
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


@pytest.mark.parametrize('family', ['efficientnet', 'repvit', 'dla', 'senet'])
def test_kinds_of_blocks(family: str):
    """RepVit's norm is in a sequence, the others have their own names of blocks."""
    name, kwargs = FAMILY_MODELS[family]
    plain = trained(name, **kwargs)
    with torch.no_grad():
        model = load(create_model(f'eca_{name}', **kwargs).eval(), plain.state_dict())
        assert torch.equal(model(image()), plain(image()))


@pytest.mark.parametrize('assign', [True, False])
def test_dtypes(assign: bool):
    """bfloat16 weights into a float32 model and float32 weights into a bfloat16 one."""
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        plain = trained('test_resnet').to(dtype)
        model = load(fresh(dtype=other), plain.state_dict(), assign=assign)
        wanted = dtype if assign else other
        assert {p.dtype for p in model.parameters()} == {wanted}
        with torch.no_grad():
            x = image().to(wanted)
            assert torch.equal(model(x), plain.to(wanted)(x))


def test_with_data_parallel_and_parameters_that_require_gradients():
    plain = trained('test_resnet')
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    model = load(nn.DataParallel(fresh()), {f'module.{key}': value for key, value in tensors.items()}, assign=False)
    assert all(p.is_leaf for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(image()), plain(image()))


@pytest.mark.parametrize(('part', 'changed'), [
    ('fc.', {'fc.weight', 'fc.bias'}),
    ('layer2.0.bn2.weight', {'layer2.0.bn2.norm.weight', 'layer2.0.bn2.attn.conv.weight'}),
    ('layer2.0.bn2.bias', {'layer2.0.bn2.norm.bias'}),
    ('layer2.0.bn2.running_mean', {'layer2.0.bn2.norm.running_mean'}),
])
def test_parts(part: str, changed: set[str]):
    """With the scale comes a warm start. Other tensors are loaded as they are."""
    given = {key: value for key, value in trained('test_resnet').state_dict().items() if key.startswith(part)}
    model = trained('eca_test_resnet')
    before = copy.deepcopy(model.state_dict())
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected
    after = model.state_dict()
    assert {key for key, value in after.items() if not torch.equal(value, before[key])} == changed
    assert set(missing) | changed | {k for k in after if 'num_batches' in k} >= set(after)
    for key in changed:
        name = key.replace('.norm.', '.')
        factor = 2 if key.endswith('.norm.weight') else 1
        assert torch.equal(after[key], torch.zeros(1, 1, 3) if '.attn.' in key else factor * given[name])


def place(attn: nn.Module) -> NormAttn:
    return NormAttn(nn.BatchNorm2d(32), attn)


def test_other_attentions():
    """Without parameters or of another package: the names change and nothing is scaled."""
    norm = nn.BatchNorm2d(32)
    nn.init.uniform_(norm.weight)
    model = place(ATTENTIONS['se_var1'].make(32, 3))
    load(model, norm.state_dict())  # type: ignore[arg-type]
    assert torch.equal(model.norm.weight, norm.weight)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "attn.0.weight"'):
        place(nn.Sequential(nn.Conv2d(32, 32, 1, bias=False))).load_state_dict(norm.state_dict())
    for attn in ('cbam', 'se'):  # on `meta` the tensors that are not zero have no values
        with torch.device('meta'), pytest.raises(RuntimeError, match='Missing key'):
            place(ATTENTIONS[attn].make(32, 3)).load_state_dict(norm.state_dict(), assign=True)
        plain = trained('test_resnet')
        model = add_attn(copy.deepcopy(plain), attn)
        load(model, plain.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(model(image()), plain(image()))


@pytest.mark.parametrize('way', ['strict', 'not strict', 'deepcopy', 'pickle', 'checkpoint_path', 'overlay'])
def test_eca_beside_the_norm(way: str, tmp_path: Path):
    """The names of the authors and of timm's `EcaModule`, whose formula is the paper's for these channels."""
    ours, peer = trained('eca_test_resnet'), trained('test_resnet', block_args={'attn_layer': 'eca'})
    with torch.no_grad():
        for given, wanted, name in ((to_official(ours.state_dict()), ours, 'eca'), (peer.state_dict(), peer, 'se')):
            assert f'layer1.0.{name}.conv.weight' in given
            assert torch.equal(WAYS[way](given, tmp_path / 'weights.pth')(image()), wanted(image()))


def test_names_beside_the_norm_of_other_models():
    """In a larger network, in another family, and not after ECA was removed."""
    regnet = trained('eca_regnety_002')
    beside = {
        key.replace('.conv3.bn.attn.', '.eca.').replace('.norm.', '.'): value
        for key, value in regnet.state_dict().items()}
    wrapped = nn.Sequential(create_model('eca_regnety_002').eval())
    load(wrapped, {f'0.{key}': value for key, value in beside.items()})
    with torch.no_grad():
        assert torch.equal(wrapped(image()), regnet(image()))
    given = to_official(trained('eca_test_resnet').state_dict())
    plain = remove_eca(add_attn(trained('test_resnet'), 'eca'))
    missing, unexpected = plain.load_state_dict(given, strict=False)
    assert (missing, {key.rpartition('.eca.')[1] for key in unexpected}) == ([], {'.eca.'})


@pytest.mark.parametrize(('given', 'attn'), [('se', 'se_var1'), ('eca', 'se_var1'), ('se', 'eca')])
def test_other_attention_in_a_checkpoint(given: str, attn: str):
    """It is refused, also where the number of classes differs, and timm does not ask for all keys."""
    state_dict = create_model('eca_test_resnet', attn_layer=given).state_dict()
    with pytest.raises(ValueError, match=r'has the attention layer1\.0\.bn2\.attn\.'):
        create_model('eca_test_resnet', attn_layer=attn, num_classes=3, pretrained=True, pretrained_cfg_overlay={
            'state_dict': state_dict})


@pytest.mark.parametrize(('name', 'kwargs', 'fix'), [
    ('eca_test_resnet', {'kernel_sizes': [3, 5, 5, 7]}, r'kernel_sizes=\[3, 5, 5, 7\]'),
    ('eca_rexnet_100', {'depth_mult': 0.5}, "kernel_sizes='adaptive'"),
])
def test_advice_on_kernel_sizes(name: str, kwargs: dict, fix: str):
    state_dict = create_model(name, **kwargs).state_dict()
    with pytest.raises(ValueError, match=rf'(?s)ECA kernels of sizes 3[,/].* {fix}'):
        create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict}, **{
            **kwargs, 'kernel_sizes': 3})
