"""Fused norm and ECA against the modules, called one by one: only the cost may differ."""
import copy
import importlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from benchmarks.measure import kept_bytes
from helpers.forked import call
from timm.layers import BatchNormAct2d
from timm.models import create_model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from timm_eca import EfficientChannelAttention, set_fused
from timm_eca.layers import fused, fused_cpu, norm_attn
from timm_eca.layers.norm_attn import NormAttn, named_norm_attn

FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    """The switch is on before and after each test."""
    set_fused(True)
    yield
    set_fused(True)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each norm and ECA that are fused."""
    calls: list[int] = []

    def count(*args: Any) -> torch.Tensor | None:
        out = fused.fused_norm_eca(*args)
        calls.extend([1] * (out is not None))
        return out
    monkeypatch.setattr(norm_attn, 'fused_norm_eca', count)
    return calls


def make(name: str = 'eca_test_resnet', dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """A small model whose norms and gates are neither zero nor one."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, EfficientChannelAttention):
            nn.init.normal_(module.conv.weight)
    return model.to(dtype)


def image(n: int = 3, size: int = 64, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor, on: bool) -> dict[str, torch.Tensor]:
    """Logits, gradients and buffers after a forward and backward pass with a fixed seed."""
    set_fused(on)
    torch.manual_seed(2)
    x = x.detach().requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    found = {'logits': logits.detach(), 'x': x.grad, **dict(model.named_buffers())}
    found.update({f'{name}.grad': p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-8) -> None:
    """Equal but for rounding, relative to the largest gradient, since some are zero but for rounding."""
    assert found.keys() == wanted.keys()
    largest = max(w.abs().max() for name, w in wanted.items() if name.endswith('.grad'))
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        scale = largest if name.endswith('.grad') else max(value.abs().max(), 1e-3)
        assert (found[name].double() - value.double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(('name', 'mode', 'memory_format'), [
    *(('eca_test_resnet', mode, memory_format) for mode in ('train', 'frozen norms', 'eval')
      for memory_format in (torch.contiguous_format, torch.channels_last)),
    pytest.param('eca_mobilenetv2_050', 'train', torch.channels_last, marks=pytest.mark.slow),
])
def test_whole_models(name: str, mode: str, memory_format: torch.memory_format, fused_calls: list[int]):
    model = make(name, drop_path_rate=0.3).to(memory_format=memory_format).train(mode != 'eval')
    if mode == 'frozen norms':
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    other = copy.deepcopy(model)
    x = image().to(memory_format=memory_format)
    found = step(model, x, on=True)
    assert fused_calls
    assert_same(found, step(other, x, on=False))
    assert {n: b for n, b in model.named_buffers() if 'num_batches' in n} == {
        n: b for n, b in other.named_buffers() if 'num_batches' in n}
    with torch.inference_mode():
        set_fused(True)
        logits = model.eval()(x)
        set_fused(False)
        torch.testing.assert_close(logits, other.eval()(x), rtol=1e-8, atol=1e-8)


@FORMATS
def test_inference_is_equal_to_the_modules(memory_format: torch.memory_format, fused_calls: list[int]):
    """Bit for bit, with gradients recorded and without, in all dtypes, if no map is large."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make(dtype=dtype).eval().to(memory_format=memory_format)
        x = image(1, 32, dtype).to(memory_format=memory_format)
        for autocast in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                set_fused(True)
                found = [model(x)]
                with torch.inference_mode():
                    found.append(model(x))
                assert fused_calls
                set_fused(False)
                assert all(torch.equal(logits, model(x)) for logits in found), (dtype, autocast)


@FORMATS
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_constant_gates_are_bit_equal_to_the_plain_model(
        dtype: torch.dtype, memory_format: torch.memory_format, fused_calls: list[int]):
    """After a warm start: logits and running statistics, in training, too."""
    plain, model = make('test_resnet', dtype), make(dtype=dtype)
    model.load_state_dict(plain.state_dict())
    x = image(dtype=dtype).to(memory_format=memory_format)
    for m in (model, plain):
        m.to(memory_format=memory_format)
    for training in (True, False):
        assert torch.equal(model.train(training)(x), plain.train(training)(x))
        buffers = {name.replace('.norm.', '.'): b for name, b in model.named_buffers()}
        assert all(torch.equal(buffers[n], b) for n, b in plain.named_buffers())
        with torch.inference_mode():
            assert torch.equal(model(x), plain(x))
    assert fused_calls


@FORMATS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n', [1, 3])
def test_folded_into_the_norm(
        n: int, dtype: torch.dtype, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch):
    """The way of large maps: constant gates give the plain norm's bits, others the modules' output but for rounding."""
    module = Tail(70).to(dtype).eval()
    monkeypatch.setattr(fused_cpu, '_LARGE', 0)
    z = torch.randn(n, 70, 9, 7, dtype=dtype).to(memory_format=memory_format)
    with torch.no_grad():
        torch.testing.assert_close(module.place(z), module.eca(module.norm(z)))
        assert not torch.equal(module.place(z), module.norm(z))
        plain = module.norm(z)
        nn.init.zeros_(module.eca.conv.weight)
        module.norm.weight.mul_(2)
        module.norm.bias.mul_(2)
        assert torch.equal(module.place(z), plain)
        before = z.clone()
        for large in (0, 2 ** 20):  # the norm's output is overwritten, and nothing else
            monkeypatch.setattr(fused_cpu, '_LARGE', large)
            module.place(z)
            assert torch.equal(z, before)


@pytest.mark.parametrize(('name', 'base'), [('eca_resnet18', 'resnet18'), ('eca_mobilenetv2_050', 'mobilenetv2_050')])
def test_bytes_kept_for_backward(name: str, base: str):
    x = image(1, 160, torch.float32)
    plain = kept_bytes(create_model(base), x)
    assert kept_bytes(create_model(name), x) <= 1.005 * plain
    set_fused(False)
    assert kept_bytes(create_model(name), x) > 1.02 * plain  # there was something to save


class Tail(nn.Module):
    """The end of a block by itself."""

    def __init__(
            self,
            channels: int = 6,
            kernel_size: int = 3,
            norm: Callable[..., nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 1, bias=False)
        self.place = NormAttn(norm(channels), EfficientChannelAttention(kernel_size))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.eca.conv.weight)
        if self.norm.track_running_stats:
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)

    @property
    def norm(self) -> Any:
        return self.place.norm

    @property
    def eca(self) -> Any:
        return self.place.attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.place(self.conv(x))

    def by_modules(self, x: torch.Tensor) -> torch.Tensor:
        return self.eca(self.norm(self.conv(x)))


@FORMATS
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(('kernel_size', 'n'), [(1, 1), (3, 2)])
def test_gradcheck_and_gradgradcheck(
        kernel_size: int, n: int, training: bool, memory_format: torch.memory_format, fused_calls: list[int]):
    torch.manual_seed(0)
    module = Tail(3, kernel_size).double().train(training)
    x = torch.randn(n, 4, 2, 3, dtype=torch.float64).to(memory_format=memory_format)
    names = [name for name, _ in module.named_parameters()]

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))
    inputs = (x.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert fused_calls


def test_torch_func_and_forward_mode(fused_calls: list[int]):
    module = Tail().double().eval()
    parameters = dict(module.named_parameters())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    def found() -> list[torch.Tensor]:
        gradients = torch.func.grad(loss)(parameters, x)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
        _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            raw = torch.autograd.forward_ad.unpack_dual(dual).tangent
        return [*gradients.values(), *each.values(), tangent, raw]
    results = found()
    assert not fused_calls
    set_fused(False)
    for a, b in zip(results, found()):
        assert torch.equal(a, b)


def test_traced_and_in_data_parallel_replicas(fused_calls: list[int]):
    module = Tail().eval()
    x = torch.randn(2, 4, 3, 3)
    wanted = module.by_modules(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        warnings.filterwarnings('ignore', '.*deprecated')
        assert torch.equal(torch.jit.trace(module, x, check_trace=False)(x), wanted)
    graph = make_fx(lambda x: module(x))(x)
    assert torch.equal(graph(x), wanted)
    replica = module.norm._replicate_for_data_parallel()  # has its tensors as plain attributes
    replica._parameters = {}
    replica.weight, replica.bias = module.norm.weight * 1, module.norm.bias * 1
    module.place.norm = replica
    assert torch.equal(module(x), wanted)
    assert not fused_calls


def test_shared_weights_and_tensor_hooks_below_create_graph():
    """A path around the operation to its own weights counts once, and so does a hook on them."""
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    def gradients(on: bool, hook: bool) -> list[torch.Tensor]:
        set_fused(on)
        torch.manual_seed(0)
        module = Tail(4).double()
        if hook:
            module.norm.weight.register_hook(lambda g: 2 * g)
            module.conv.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: 3 * g) and None)
        loss = module(module(x) if not hook else x).square().sum()
        return list(torch.autograd.grad(loss, list(module.parameters()), create_graph=True))
    for hook in (False, True):
        for found, wanted in zip(gradients(True, hook), gradients(False, hook)):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@FORMATS
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_far_from_zero(dtype: torch.dtype, memory_format: torch.memory_format):
    """If the convolution's output has a large mean, sums whose terms cancel must not be rounded first."""
    torch.manual_seed(0)
    module = Tail(8).train()
    generator = torch.Generator().manual_seed(1)
    z = (torch.randn(8, 8, 8, 8, generator=generator) + 50).to(dtype).to(memory_format=memory_format)
    grad = torch.randn(8, 8, 8, 8, generator=generator).to(dtype)

    def gradients(on: bool, exact: bool) -> list[torch.Tensor]:
        set_fused(on)
        m = copy.deepcopy(module).double() if exact else copy.deepcopy(module)
        m.conv = nn.Conv2d(8, 8, 1, bias=False)
        nn.init.dirac_(m.conv.weight)
        m.conv.to(torch.float64 if exact else dtype)
        x = z.double() if exact else z.clone(memory_format=torch.preserve_format)
        x = x.requires_grad_()
        with torch.autocast('cpu', dtype, enabled=not exact):
            out = m(x)
        return list(torch.autograd.grad(out, [x, m.norm.weight, m.norm.bias, m.eca.conv.weight], grad.to(x.dtype)))
    for found, plain, wanted in zip(gradients(True, False), gradients(False, False), gradients(False, True)):
        def distance(g: torch.Tensor, wanted: torch.Tensor = wanted) -> float:
            return ((g.double() - wanted).norm() / wanted.norm()).item()
        assert distance(found) <= 2 * distance(plain) + 2e-3


def test_large_gradients_in_float16():
    torch.manual_seed(0)
    module = Tail(8).train()
    nn.init.ones_(module.norm.weight)
    x = (torch.randn(8, 4, 8, 8) * 0.02).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for on in (True, False):
        set_fused(on)
        with torch.autocast('cpu', torch.float16):
            out = module(x)
        results.append(torch.autograd.grad((out.float() * out.float().detach() * 16).sum(), x)[0])
    assert results[0].isfinite().all()
    assert results[0].abs().max() < 2 * results[1].abs().max()


@pytest.mark.parametrize('settings', [
    {'padding': 1, 'padding_mode': 'circular'}, {'padding': 2, 'dilation': 2}, {'padding': 'same'}])
def test_other_settings_of_the_convolution(settings: dict, fused_calls: list[int]):
    module = Tail().double().eval()
    module.eca.conv = nn.Conv1d(1, 1, 3, bias=False, dtype=torch.float64, **settings)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(module(x), module.by_modules(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module.by_modules, backend='eager')(x), module.by_modules(x))
    assert not fused_calls


def test_batches_of_gradients():
    torch.manual_seed(0)
    module = Tail(4).double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    for training, memory_format in itertools.product((True, False), (torch.contiguous_format, torch.channels_last)):
        module.train(training)
        found, wanted = (torch.autograd.functional.jacobian(
            f, x.to(memory_format=memory_format), vectorize=f is module)
            for f in (module, module.by_modules))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_class_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch):
    module, x = Tail().eval(), torch.randn(2, 4, 3, 3)
    monkeypatch.setattr(nn.BatchNorm2d, 'forward', lambda self, x: 3 * x)
    assert torch.equal(module(x), module.eca(3 * module.conv(x)))


def test_function_modes_see_what_happens(fused_calls: list[int]):
    module, x = Tail().eval(), torch.randn(2, 4, 3, 3)
    with torch.no_grad(), torch.overrides.BaseTorchFunctionMode():
        module(x)
    assert not fused_calls
    with torch.device('cpu'):  # a mode, too
        module(x)
    assert fused_calls


def test_bias_may_change_before_backward():
    module, x = Tail().double().train(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    loss = module(x).square().sum()
    first = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    with torch.no_grad():
        module.norm.bias.sub_(0.1)
    for create_graph in (False, True):
        again = torch.autograd.grad(
            loss, list(module.parameters()), retain_graph=True, create_graph=create_graph)
        for a, b in zip(first, again):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def modules_of(module: Tail) -> list[nn.Module]:
    return [module.norm, module.norm.drop, module.norm.act, module.eca, module.eca.conv, module.conv]


def tail_of_all() -> Tail:
    torch.manual_seed(0)
    return Tail(norm=lambda c: BatchNormAct2d(c, apply_act=False)).double().train()


HOOKS = {
    'forward': (nn.Module.register_forward_hook, nn.modules.module.register_module_forward_hook),
    'forward_pre': (nn.Module.register_forward_pre_hook, nn.modules.module.register_module_forward_pre_hook),
    'backward': (nn.Module.register_full_backward_hook, nn.modules.module.register_module_full_backward_hook),
    'backward_pre': (
        nn.Module.register_full_backward_pre_hook, nn.modules.module.register_module_full_backward_pre_hook),
}


def run_with_hooks(register: Callable, forward: Callable) -> list[tuple[str, torch.Tensor]]:
    """For each call of a hook: the class of the module, and the hook's last tensor."""
    seen: list[tuple[str, torch.Tensor]] = []

    def hook(module: nn.Module, *args: Any) -> None:
        tensor = args[-1] if isinstance(args[-1], torch.Tensor) else args[-1][0]
        seen.append((type(module).__name__, tensor.detach().clone()))
    handle = register(hook)
    try:
        torch.manual_seed(1)
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        forward(x).square().sum().backward()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize('kind', HOOKS)
def test_hooks(kind: str, fused_calls: list[int]):
    """On one module, and on all."""
    of_a_module, of_all = HOOKS[kind]
    for which in range(6):
        results = []
        for on in (True, False):
            module = tail_of_all()
            hooked = modules_of(module)[which]
            results.append(run_with_hooks(
                lambda f, hooked=hooked: of_a_module(hooked, f), module if on else module.by_modules))
        assert len(results[0]) == len(results[1]) == 1
        assert torch.allclose(results[0][0][1], results[1][0][1], rtol=1e-10)
    fused_calls.clear()  # the norm and ECA are fused if the hooked module is another
    seen = [name for name, _ in run_with_hooks(of_all, tail_of_all())]
    assert {'BatchNormAct2d', 'Identity', 'EfficientChannelAttention', 'Conv1d'} <= {*seen}
    assert not fused_calls


def test_forward_of_its_own():
    """accelerate and others replace `forward` of an instance."""
    for which in range(6):
        module = tail_of_all()
        replaced = modules_of(module)[which]
        replaced.forward = Mock(wraps=replaced.forward)
        module(torch.randn(2, 4, 3, 3, dtype=torch.float64))
        replaced.forward.assert_called_once()


def test_attention_swapped_or_parametrized(fused_calls: list[int]):
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x
    module, x = Tail().double().eval(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(module.norm, 'weight', Double())
    assert torch.equal(module(x), module.by_modules(x))
    module = Tail().double().eval()
    nn.utils.parametrize.register_parametrization(module.eca.conv, 'weight', Double())
    assert torch.equal(module(x), module.by_modules(x))
    module = Tail().double().eval()
    module.eca.conv = nn.Conv1d(1, 1, 3, padding=1, bias=True, dtype=torch.float64)
    assert torch.equal(module(x), module.by_modules(x))
    assert not fused_calls


@pytest.mark.parametrize('norm', [
    lambda c: nn.BatchNorm2d(c, momentum=None), lambda c: nn.BatchNorm2d(c, momentum=0.3, eps=0.1),
    lambda c: BatchNormAct2d(c, apply_act=False), lambda c: BatchNormAct2d(c, act_layer='silu'),
    lambda c: BatchNormAct2d(c, apply_act=False, drop_layer=nn.Dropout),
    lambda c: nn.BatchNorm2d(c, track_running_stats=False)])
@pytest.mark.parametrize('training', [True, False])
def test_kinds_of_batch_norm(norm: Callable, training: bool):
    torch.manual_seed(0)
    module = Tail(norm=norm).double().train(training)
    other, x = copy.deepcopy(module), torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for _ in range(2):
        torch.manual_seed(1)
        found = module(x)
        torch.manual_seed(1)
        torch.testing.assert_close(found, other.by_modules(x), rtol=1e-12, atol=1e-12)
    for a, b in zip(module.buffers(), other.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('x', [
    torch.randn(2, 4, 1, 1), torch.randn(1, 4, 5, 3), torch.randn(1, 4, 2, 2), torch.randn(3, 4, 7, 1),
    torch.randn(2, 5, 6, 4).permute(0, 3, 1, 2), torch.randn(2, 4, 9, 9)[:, :, ::2, ::2],
    torch.randn(2, 4, 1, 6).expand(2, 4, 5, 6), torch.randn(4, 2, 5, 5).transpose(0, 1),
], ids=lambda x: f'{tuple(x.shape)}-{x.stride()}')
def test_odd_shapes_and_strides(x: torch.Tensor, training: bool):
    torch.manual_seed(0)
    module = Tail().double().train(training)
    other, x = copy.deepcopy(module), x.double()
    results = []
    for forward in (module, other.by_modules):
        inputs = x.clone().requires_grad_()
        out = forward(inputs)
        gradient, = torch.autograd.grad(out, inputs, torch.ones(1, dtype=torch.float64).expand_as(out))
        with torch.no_grad():
            results.append([out, gradient, forward(x)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels', [1, 512])
def test_other_channels_are_refused_before_anything_is_written(channels: int, training: bool):
    module = Tail().train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r'should contain|expand'):
        module.place(torch.randn(2, channels, 8, 8, requires_grad=True))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {'place.norm.num_batches_tracked'}


def test_tensors_with_gaps(fused_calls: list[int]):
    """The kernels of a GPU read them as if they had none."""
    for place in ('weight', 'running_var'):
        module, x = Tail(8).eval(), torch.randn(2, 4, 3, 3)
        wide = torch.rand(8, 2) + 0.5
        if place == 'weight':
            module.norm.weight = nn.Parameter(wide[:, 0])
        else:
            module.norm.running_var = wide[:, 0]
        assert torch.equal(module(x), module.by_modules(x))
    assert not fused_calls


def test_what_the_modules_refuse_or_take(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        Tail().train()(torch.randn(1, 4, 1, 1))
    with torch.inference_mode():
        assert Tail().eval()(torch.zeros(0, 4, 8, 8)).shape == (0, 6, 8, 8)
    monkeypatch.setattr(fused_cpu, '_LARGE', 0)
    for change in (nn.Module.half, nn.Module.bfloat16):
        module = change(Tail().eval())
        with torch.no_grad(), pytest.raises(RuntimeError, match=r'dtype|type'):
            module.place(torch.randn(2, 6, 8, 8))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, fused_calls: list[int]):
    model = make(dtype=torch.float32).train()
    other, exact = copy.deepcopy(model), copy.deepcopy(model)
    x = image(4, 32, torch.float32)
    results = []
    for on, m in ((True, model), (False, other)):
        with torch.autocast('cpu', dtype):
            results.append(step(m, x, on))
    wanted = step(exact, x, False)
    assert fused_calls
    assert results[0]['logits'].dtype == results[1]['logits'].dtype == dtype

    def distance(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((found[n] - wanted[n]).square().sum() for n in wanted if n.endswith('.grad')).sqrt()  # type: ignore
    assert distance(results[0]) <= 1.5 * distance(results[1])
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=0.02, atol=0.02)


@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing(reentrant: bool):
    """Bit-equal to no checkpointing: the pass without gradients and the recomputation compute the same."""
    model, x = make(dtype=torch.float32, drop_path_rate=0.3).train(), image(4, dtype=torch.float32).requires_grad_()
    results = []
    for network in (model, copy.deepcopy(model)):
        torch.manual_seed(2)
        logits = network(x) if network is model else checkpoint(network, x, use_reentrant=reentrant)
        x.grad = None
        logits.square().sum().backward()
        results.append([logits, x.grad, *(p.grad for p in network.parameters())])
    assert all(map(torch.equal, *results))


def test_changing_what_was_kept_is_noticed():
    module, z = Tail(), torch.randn(2, 6, 3, 3)
    out = module.place(z)
    out.add_(1)  # as timm's blocks add their shortcut: the output is not saved
    out.sum().backward()
    out = module.place(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_only_gates_are_trained(fused_calls: list[int]):
    """Frozen parameters get no gradient."""
    model = make().eval().requires_grad_(False)
    for _, place in named_norm_attn(model):
        place.attn.requires_grad_()
    other = copy.deepcopy(model)
    found, wanted = step(model, image(), True), step(other, image(), False)
    assert_same(found, wanted)
    assert sum(name.endswith('.grad') for name in found) == len(fused_calls) == 4


def test_variable():
    def read() -> int:
        for value in '01':
            os.environ['TIMM_ECA_FUSED'] = value
            print(importlib.reload(fused).backend_of(torch.device('cpu')) is not None)
        return 0
    assert call(read) == (0, 'False\nTrue\n')
