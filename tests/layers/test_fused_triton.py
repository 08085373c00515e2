"""The Triton kernels without a GPU: in Triton's interpreter, compiled for GPUs, and the traffic of a step with them."""
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from helpers.forked import call, import_anew

from timm_eca import EfficientChannelAttention, set_fused
from timm_eca.errors import TimmEcaError
from timm_eca.layers import fused
from timm_eca.layers.fused import fused_norm_eca

pytest.importorskip('triton')

import triton
from traffic import step_traffic
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_eca.layers import fused_triton


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    yield
    set_fused(cpu=True, cuda=False)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """In a process of their own: the variable must be set before triton is imported, and changes all of its kernels."""
    path = Path(__file__).with_name('triton_in_interpreter.py')
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
    _, block_c, block_p = fused_triton._layout(32, 256, 3136, channels_last)
    constants = {'BLOCK_C': block_c, 'BLOCK_P': block_p, 'stride_c' if channels_last else 'stride_p': 1, 'chunks': 1}
    small = {'K': 3, 'FLIP': True, 'BLOCK': 256}
    for kernel, values in (
            (fused_triton._moments_kernel, constants), (fused_triton._sums_kernel, constants),
            (fused_triton._combine_kernel, constants), (fused_triton._convolve_kernel, small),
            (fused_triton._correlate_kernel, small)):
        names = kernel.arg_names
        constant = {name: value for name, value in values.items() if name in names}
        signature = {name: 'i32' if name in ('channels', 'length') or name.startswith(('stride', 'on_z_stride')) else
                     f'*{dtype}' if values is constants and name in ('z', 'd', 'out') else '*fp32' for name in names}
        signature.update(dict.fromkeys(constant, 'constexpr'))
        aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if name not in constant}
        values_at = {(names.index(name),): value for name, value in constant.items()}
        source = ASTSource(kernel, signature, values_at, aligned)
        compiled = triton.compile(source, target=GPUTarget('cuda', arch, 32))
        assert compiled.asm['cubin']
        ptx = compiled.asm['ptx']
        assert not re.search(r'\b(atom|red)\.', ptx)
        if values is constants:
            assert 'ld.global.v4.b32' in ptx
            assert ('st.global.v4.b32' in ptx) == (kernel is fused_triton._combine_kernel)


@pytest.mark.parametrize(('name', 'timm_ratio'), [
    pytest.param('eca_resnet50', 1.40, marks=pytest.mark.slow), ('eca_mobilenetv2', 1.07)])
def test_traffic_of_a_training_step(name: str, timm_ratio: float):
    plain, by_modules, by_kernels = (step_traffic(kind, name) for kind in ('plain', 'timm', 'triton'))
    assert by_kernels.outside <= 1.02 * plain.outside
    assert by_kernels.convolutions == plain.convolutions
    assert by_modules.outside > timm_ratio * plain.outside  # there was something to save
    places = 16 if name == 'eca_resnet50' else 17
    assert by_kernels.launches == {
        '_moments_kernel': places, '_sums_kernel': places, '_combine_kernel': 2 * places,
        '_convolve_kernel': 2 * places, '_correlate_kernel': places}


@pytest.mark.parametrize('channels_last', [True, False])
def test_layouts(channels_last: bool):
    for n in (1, 8, 256):
        for channels in (1, 16, 24, 320, 2048):
            for side in (1, 7, 9, 28, 56, 112, 113):
                chunks, block_c, block_p = fused_triton._layout(n, channels, side ** 2, channels_last)
                assert side ** 2 % chunks == 0  # the variance needs chunks of one size
                assert (side ** 2 // chunks) % math.gcd(side ** 2, 16) == 0
                assert block_c * block_p <= 2048
                assert chunks == 1 or side ** 2 // chunks >= block_p


def test_switch(monkeypatch: pytest.MonkeyPatch):
    """Each argument sets its own switch, and CUDA is off unless asked for."""
    assert fused.backends == {'cpu': fused.fused_cpu}
    set_fused(cuda=True)
    set_fused(True)
    assert fused.backends == {'cpu': fused.fused_cpu, 'cuda': fused_triton}
    set_fused(False)
    assert fused.backends == {'cuda': fused_triton}
    set_fused(cpu=True, cuda=False)
    assert fused.backends == {'cpu': fused.fused_cpu}

    z = torch.empty(2, 8, 3, 3, device='meta')
    norm, attn = nn.BatchNorm2d(8, device='meta'), EfficientChannelAttention(device='meta')
    assert fused_norm_eca(z, norm, attn) is None
    monkeypatch.setattr(fused_triton, '_launch', lambda *args: None)
    monkeypatch.setitem(fused.backends, 'meta', fused_triton)
    assert fused_norm_eca(z, norm, attn) is not None
    assert fused_norm_eca(z, nn.SyncBatchNorm(8, device='meta'), attn) is None
    assert fused_norm_eca(z.double(), norm.double(), attn.double()) is None  # by the modules

    monkeypatch.delattr('timm_eca.layers.fused_triton')
    monkeypatch.setitem(sys.modules, 'timm_eca.layers.fused_triton', None)  # importing it raises ImportError
    with pytest.raises(TimmEcaError, match='pip install triton'):
        set_fused(cuda=True)


def test_not_imported_on_a_cpu():
    def train() -> int:
        import_anew()
        import timm_eca  # noqa: F401 (registers)

        timm.create_model('eca_test_resnet')(torch.randn(2, 3, 32, 32)).sum().backward()
        assert 'timm_eca.layers.fused' in sys.modules
        return 'timm_eca.layers.fused_triton' in sys.modules

    assert call(train) == (0, '')
