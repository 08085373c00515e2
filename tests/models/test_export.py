"""The models outside of eager PyTorch: TorchScript, FX, torch.compile, torch.export and ONNX Runtime."""
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from helpers.networks import image, randomize_norms
from timm.models import create_model

from timm_eca import set_fused
from timm_eca.layers.attention import ATTENTIONS
from timm_eca.layers.norm_attn import NormAttn

NAME = 'eca_test_resnet'  # has both blocks of ResNets


@pytest.fixture
def model() -> nn.Module:
    return randomize_norms(create_model(NAME, num_classes=10)).eval()


def _quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that warns of its deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return function(*args, **kwargs)


def _by_modules(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output without fusing, which only eager PyTorch does."""
    set_fused(False)
    try:
        return model(x)
    finally:
        set_fused(True)


def _assert_equal_logits(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_script(model: nn.Module, tmp_path: Path):
    scripted = _quiet(torch.jit.script, model)
    _quiet(torch.jit.save, scripted, tmp_path / 'model.pt')
    loaded = _quiet(torch.jit.load, tmp_path / 'model.pt')
    with torch.inference_mode():
        assert torch.equal(loaded(image()), _by_modules(model, image()))
    assert scripted.state_dict().keys() == model.state_dict().keys()


def test_script_in_training():
    scripted = _quiet(torch.jit.script, create_model(NAME, drop_path_rate=0.1).train())
    scripted(image()).sum().backward()
    assert all(p.grad is not None for p in scripted.parameters())


@pytest.mark.parametrize('attn', ATTENTIONS)
def test_script_and_export_of_attentions(attn: str):
    place = NormAttn(nn.BatchNorm2d(32), ATTENTIONS[attn].make(32, 3)).eval()
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        wanted = _by_modules(place, x)
        _assert_equal_logits(_quiet(torch.jit.script, place)(x), wanted)
        _assert_equal_logits(torch.export.export(place, (x,)).module()(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kwargs'), [
    ('eca_mobilenetv2_050', {}), ('eca_rexnet_100', {'depth_mult': 0.5}), ('eca_tf_efficientnet_cc_b0_4e', {})])
def test_script_and_export_of_twins(name: str, kwargs: dict):
    model = randomize_norms(create_model(name, **kwargs)).eval()
    with torch.no_grad():
        wanted = _by_modules(model, image())
        _assert_equal_logits(_quiet(torch.jit.script, model)(image()), wanted)
        _assert_equal_logits(torch.export.export(model, (image(),)).module()(image()), wanted)


def test_fx(model: nn.Module):
    graph = torch.fx.symbolic_trace(model)
    with torch.inference_mode():
        assert torch.equal(graph(image()), _by_modules(model, image()))
        features = create_model(NAME, features_only=True, feature_cls='fx', out_indices=(1, 4)).eval()
        plain = create_model(NAME, features_only=True, out_indices=(1, 4)).eval()
        assert [f.shape for f in features(image())] == [f.shape for f in plain(image())]


@pytest.mark.parametrize('training', [True, False])
def test_compile_in_one_graph(training: bool, model: nn.Module):
    model.train(training)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    _assert_equal_logits(compiled(image()), _by_modules(model, image()))
    assert len(graphs) == 1
    if training:
        compiled(image()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def _block() -> tuple[nn.Module, torch.Tensor]:
    """A block with ECA and an input: the C++ compiler needs half a minute for a whole network."""
    block = randomize_norms(create_model('eca_test_resnet')).eval().layer1[0]
    return block, torch.randn(3, block.conv1.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_inductor():
    block, x = _block()
    torch._dynamo.reset()
    with torch.inference_mode():
        _assert_equal_logits(torch.compile(block, fullgraph=True)(x), _by_modules(block, x))


def test_export_with_dynamic_batch(model: nn.Module):
    exported = torch.export.export(
        model, (image(),), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}, strict=True).module()
    x = torch.cat([image(), image() + 1, image() - 1])
    with torch.inference_mode():
        _assert_equal_logits(exported(x), _by_modules(model, x))


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path: Path):
    block, x = _block()
    with torch.no_grad():
        exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / 'model.pt2'))
        loaded = torch._inductor.aoti_load_package(package)
        for count in (1, 3):
            _assert_equal_logits(loaded(x[:count]), _by_modules(block, x[:count]))


@pytest.mark.slow
def test_int8():
    pytest.importorskip('torchao')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    model = randomize_norms(create_model('eca_resnet18', num_classes=10)).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 64, 64, generator=generator)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        prepared(x)
        int8 = convert_pt2e(prepared)
        wanted, found = model(x), int8(x)
    weights = [value for value in int8.state_dict().values() if value.dtype == torch.int8]
    assert len(weights) == 21  # 20 convolutions and a linear layer
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.slow
def test_onnx_runtime(model: nn.Module, tmp_path: Path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    _quiet(
        torch.onnx.export, model, (image(),), path, dynamo=True, input_names=['x'], verbose=False,
        dynamic_shapes={'x': {0: torch.export.Dim('batch')}})
    session = onnxruntime.InferenceSession(path)
    x = torch.cat([image(), image() + 1, image() - 1])
    logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.inference_mode():
        _assert_equal_logits(torch.from_numpy(logits), model(x))
