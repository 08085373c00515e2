"""The Triton kernels without a GPU: in Triton's interpreter, compiled for GPUs, and where they are used."""
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn as nn
from helpers.forked import call, import_anew

from timm_eca import EfficientChannelAttention, set_fused
from timm_eca.layers import fused
from timm_eca.layers.fused import fused_norm_eca
from timm_eca.layers.norm_attn import NormAttn

pytest.importorskip('triton')

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from timm_eca.layers import fused_triton


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    yield
    set_fused(cpu=True, cuda=False)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """In a process of their own: the variable must be set before triton is imported, and changes all of its kernels."""
    path = Path(__file__).with_name('triton_kernels.py')
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', str(path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=path.parents[2])
    assert result.returncode == 0, result.stdout
    assert 'skipped' not in result.stdout


@pytest.mark.parametrize(('arch', 'dtype', 'channels_last'), [(80, 'fp16', False), (90, 'bf16', True)])
def test_kernels_compile_for_gpus(
        arch: int, dtype: str, channels_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To machine code of an A100 and an H100: maps are read and written 16 bytes at a time, and nothing is atomic."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    _, block_c, block_p = fused_triton._layout(32, 256, 3136, channels_last, 4096)
    on_maps = {'BLOCK_C': block_c, 'BLOCK_P': block_p, 'stride_c' if channels_last else 'stride_p': 1, 'chunks': 1}
    constants = {**on_maps, 'K': 3, 'BLOCK': 256}
    scalars = {'eps': 'fp32', 'count': 'fp32', 'momentum': 'fp32'} | dict.fromkeys(
        ('channels', 'length', 'rows', 'stride_c', 'stride_p'), 'i32')
    for name in ('averages', 'moments', 'statistics', 'forward', 'sums', 'gates_backward', 'backward'):
        kernel = getattr(fused_triton, f'_{name}_kernel')
        names = kernel.arg_names
        reads_maps = 'length' in names and name != 'statistics'
        constant = {arg: value for arg, value in (
            constants if reads_maps or 'K' in names else {'BLOCK_C': 32, 'BLOCK_R': 64}).items() if arg in names}
        signature = {arg: scalars.get(arg, f'*{dtype}' if arg in ('z', 'd', 'out', 'dz') else '*fp32') for arg in names}
        signature.update(dict.fromkeys(constant, 'constexpr'))
        aligned = {
            (i,): [['tt.divisibility', 16]] for i, arg in enumerate(names)
            if arg not in constant and signature[arg] != 'fp32'}
        values_at = {(names.index(arg),): value for arg, value in constant.items()}
        source = ASTSource(kernel, signature, values_at, aligned)
        compiled = triton.compile(source, target=GPUTarget('cuda', arch, 32))
        assert compiled.asm['cubin']
        ptx = compiled.asm['ptx']
        assert not re.search(r'\b(atom|red)\.', ptx)
        if reads_maps:
            assert 'ld.global.v4.b32' in ptx
            assert ('st.global.v4.b32' in ptx) == (name in ('forward', 'backward'))


@pytest.mark.parametrize('channels_last', [True, False])
def test_layouts(channels_last: bool):
    for n in (1, 8, 256):
        for channels in (1, 16, 24, 320, 2048):
            for side in (1, 7, 9, 28, 56, 112, 113):
                chunks, block_c, block_p = fused_triton._layout(n, channels, side ** 2, channels_last, 4096)
                assert side ** 2 % chunks == 0  # the variance needs chunks of one size
                assert (side ** 2 // chunks) % math.gcd(side ** 2, 16) == 0
                assert block_c * block_p <= 4096
                assert chunks == 1 or side ** 2 // chunks >= block_p


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data stand for those of a GPU, and kernels do nothing."""
    monkeypatch.setattr(fused_triton, '_launch', lambda *args: None)
    monkeypatch.setattr(fused, 'backend_of', lambda device: fused_triton)


def test_modules_that_the_kernels_take(on_meta: None):
    z = torch.empty(2, 8, 3, 3, device='meta')
    norm, attn = nn.BatchNorm2d(8, device='meta'), EfficientChannelAttention(device='meta')
    assert fused_norm_eca(z, norm, attn) is not None
    assert fused_norm_eca(z, nn.SyncBatchNorm(8, device='meta'), attn) is None
    assert fused_norm_eca(z.double(), norm.double(), attn.double()) is None  # by the modules


@pytest.mark.parametrize('first', [
    lambda module, x: torch.jit.trace(module, x, check_trace=False),
    lambda module, x: torch.func.grad(lambda x: module(x).sum())(x)])
def test_a_first_call_that_is_watched(first: Callable, monkeypatch: pytest.MonkeyPatch):
    """It runs the modules, and tries no kernel."""
    monkeypatch.setattr(fused, 'backend_of', Mock(side_effect=AssertionError))
    first(NormAttn(nn.BatchNorm2d(8), EfficientChannelAttention()).eval(), torch.randn(2, 8, 3, 3))


@pytest.mark.parametrize(('capability', 'error', 'fuses'), [
    ((9, 0), None, True), ((7, 5), None, False), ((9, 0), RuntimeError('Failed to find C compiler'), False),
    ((12, 1), TritonError('ptxas: no C compiler for this GPU'), False)])
def test_gpus(
        capability: tuple[int, int], error: Exception | None, fuses: bool, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture):
    """The kernels are used where they run, and what keeps them from running is said once."""
    fused._triton_on.cache_clear()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(fused_triton, 'infer', Mock(side_effect=error))
    monkeypatch.setattr(torch, 'ones', lambda *args, device: torch.empty(1))
    device = torch.device('cuda', 0)
    assert fused.backend_of(device) is None  # off unless asked for
    set_fused(cuda=True)
    assert [fused.backend_of(device) for _ in range(2)] == [fused_triton if fuses else None] * 2
    assert ['C compiler' in record.message for record in caplog.records] == ([True] if error else [])
    set_fused(cuda=False)
    assert fused.backend_of(device) is None
    assert fused.backend_of(torch.device('cpu')) is not None
    fused._triton_on.cache_clear()


def test_not_imported_on_a_cpu():
    def train() -> int:
        import_anew()
        import timm_eca  # noqa: F401 (registers)

        timm.create_model('eca_test_resnet')(torch.randn(2, 3, 32, 32)).sum().backward()
        assert 'timm_eca.layers.fused' in sys.modules
        return 'timm_eca.layers.fused_triton' in sys.modules

    assert call(train) == (0, '')
