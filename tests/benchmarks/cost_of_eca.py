"""Time and memory of models with ECA, relative to the plain timm model.

    python tests/benchmarks/cost_of_eca.py
    python tests/benchmarks/cost_of_eca.py --only kept training --default-allocator
    python tests/benchmarks/cost_of_eca.py --device cuda --batches 256 1024 --turns 12
    python tests/benchmarks/cost_of_eca.py --device cuda --compile

- `plain`: the timm model. All others are relative to it.
- `again`: the plain model a second time. Its distance from 1 is the error of the measurement.
- `timm`: `timm.layers.EcaModule` in the same places, with the same kernel sizes.
- `reference`: `timm_eca` with `set_fused(False)`, module by module.
- `timm_eca`: norm and ECA as one operation.

The models share their weights and take turns in one process, in changing order. A ratio is the median over the turns.
"""
import argparse
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import timm
import torch
import torch.nn as nn
from measure import kept_bytes, machine, share_weights, table, time_ratios
from timm.layers import EcaModule

from timm_eca import set_fused
from timm_eca.commands.process import keep_freed_memory
from timm_eca.layers.norm_attn import named_norm_attn

MODELS = {'eca_resnet50': 'resnet50', 'eca_mobilenetv2': 'mobilenetv2_100', 'eca_resnet18': 'resnet18'}
TIMED = ('eca_resnet50', 'eca_mobilenetv2')
KINDS = ('plain', 'again', 'timm', 'reference', 'timm_eca')
COLUMNS = {'timm': 'timm\'s `EcaModule`', 'reference': 'module by module'}  # of the tables
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def make(kind: str, name: str) -> nn.Module:
    """The model of a kind."""
    if kind in ('plain', 'again'):
        return timm.create_model(MODELS.get(name, name.removeprefix('eca_')))
    model = timm.create_model(name)
    if kind == 'timm':
        for _, place in named_norm_attn(model):
            kernel = place.attn.conv.weight
            place.attn = EcaModule(kernel_size=kernel.shape[-1])
            place.attn.conv.weight = kernel
    return model


def make_all(name: str, memory_format: torch.memory_format) -> dict[str, nn.Module]:
    models = {kind: make(kind, name).to(memory_format=memory_format) for kind in KINDS}
    share_weights(models)
    return models


def infer(kind: str, model: nn.Module, x: torch.Tensor) -> None:
    set_fused(kind == 'timm_eca')
    with torch.inference_mode():
        model(x)


def train(kind: str, model: nn.Module, x: torch.Tensor) -> None:
    set_fused(kind == 'timm_eca')
    model.zero_grad()
    model(x).square().mean().backward()


def measure_kept(sizes: tuple[int, ...]) -> list[dict]:
    """Activation memory: what one image keeps for backward, MB."""
    rows = []
    for name in MODELS:
        for size in sizes:
            row: dict = {'activation memory, MB/image': f'{name}, {size} px'}
            x = torch.randn(2, 3, size, size)
            kept = {}
            for kind in KINDS:
                set_fused(kind == 'timm_eca')
                kept[kind] = kept_bytes(make(kind, name), x) / 2e6
            row.update({kind: f'{value:.1f} ({value / kept["plain"]:.4f})' for kind, value in kept.items()})
            rows.append(row)
    return rows


def measure_training(turns: int) -> list[dict]:
    """Time of a training step on eight images, relative to the plain model, by model and memory format."""
    rows = []
    for name, label in itertools.product(TIMED, FORMATS):
        models = make_all(name, FORMATS[label])
        x = torch.randn(8, 3, 224, 224).to(memory_format=FORMATS[label])
        calls = {kind: partial(train, kind, model.train(), x) for kind, model in models.items()}
        ratios, seconds = time_ratios(calls, max(8, turns // 8))
        row: dict = {'training step': f'{name}, batch 8, {label}', 'plain, ms': round(seconds * 1e3, 1)}
        row.update({kind: f'{ratio:.3f}' for kind, ratio in ratios.items() if kind != 'plain'})
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def measure_places(turns: int, batches: tuple[int, ...] = (1, 8, 32)) -> list[dict]:
    """Time of the norms with ECA within a network in inference, minus the time of the plain norms.

    Relative to the time of the whole plain model. It has less noise than the time of whole models, but does not see the
    effect of ECA on other modules.
    """
    rows = []
    for name, batch, label in itertools.product(TIMED, batches, FORMATS):
        models = make_all(name, FORMATS[label])
        places = [place for place, _ in named_norm_attn(models['timm_eca'])]
        spent = dict.fromkeys(KINDS, 0.)

        def count(forward: Callable, kind: str, spent: dict[str, float], x: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            out = forward(x)
            spent[kind] += time.perf_counter() - start
            return out
        for kind, model in models.items():
            model.eval()
            for place in map(model.get_submodule, places):
                place.forward = partial(count, place.forward, kind, spent)
        x = torch.randn(batch, 3, 224, 224).to(memory_format=FORMATS[label])
        steps: list[float] = []
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(max(8, turns // batch) + 2):
            spent.update(dict.fromkeys(KINDS, 0.))
            for kind in random.Random(turn).sample(KINDS, len(KINDS)):
                start = time.perf_counter()
                infer(kind, models[kind], x)
                if kind == 'plain':
                    steps.append(time.perf_counter() - start)
            if turn >= 2:
                for kind in KINDS:
                    times[kind].append(spent[kind])
        whole, plain = statistics.median(steps[2:]), statistics.median(times['plain'])
        row: dict = {
            'beyond the plain norms': f'{name}, batch {batch}, {label}', 'plain, ms': f'{whole * 1e3:.1f}',
            'its norms there, ms': f'{plain * 1e3:.2f}'}
        row.update({kind: f'{(statistics.median(times[kind]) - plain) / whole:+.3f}' for kind in KINDS[1:]})
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


# On a GPU: name of the column, kind of the model, compiled or not.
GPU_KINDS = (
    ('plain', 'plain', False), ('again', 'plain', False), ('timm', 'timm', False), ('reference', 'reference', False),
    ('timm_eca', 'timm_eca', False), ('plain, compiled', 'plain', True), ('timm_eca, compiled', 'timm_eca', True),
)


def gpu() -> str:
    """The GPU, its driver, and the versions of the libraries that its speed depends on."""
    query = ['--query-gpu=name,driver_version', '--format=csv,noheader', f'--id={torch.cuda.current_device()}']
    try:
        card = subprocess.check_output(['nvidia-smi', *query], text=True).strip()  # noqa: S607 (where drivers put it)
    except (OSError, subprocess.CalledProcessError):
        card = f'{torch.cuda.get_device_name()}, driver unknown'
    triton = version('triton') if find_spec('triton') else 'missing'
    return f'{card}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Triton {triton}'


def gpu_step(kind: str, model: nn.Module, call: Callable, x: torch.Tensor) -> None:
    set_fused(kind == 'timm_eca', cuda=kind == 'timm_eca')
    with torch.autocast(x.device.type, torch.bfloat16), torch.inference_mode(not model.training):
        out = call(x)
    if model.training:
        model.zero_grad()
        out.float().square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def measure_gpu(
        turns: int, batches: Sequence[int], compiled_too: bool, device: str = 'cuda', image_size: int = 224,
) -> list[dict]:
    """Images per second and peak memory in bf16; compiled models are relative to the compiled plain model."""
    title = 'bf16, channels_last: images/s (relative; peak memory, relative)'
    kinds = [kind for kind in GPU_KINDS if compiled_too or not kind[2]]
    rows = []
    for batch, name, training in itertools.product(batches, TIMED, (False, True)):
        torch._dynamo.reset()
        models = {label: make(kind, name).to(device, memory_format=torch.channels_last) for label, kind, _ in kinds}
        share_weights(models)
        x = torch.randn(batch, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
        calls: dict[str, Callable[[], object]] = {}
        peaks = {}
        for label, kind, compiled in kinds:
            model = models[label].train(training)
            call = torch.compile(model, fullgraph=True) if compiled else model
            calls[label] = partial(gpu_step, kind, model, call, x)
            for _ in range(2):  # the first call compiles and chooses algorithms
                if x.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                calls[label]()
            peaks[label] = torch.cuda.max_memory_allocated() if x.is_cuda else 1
            model.zero_grad()
        ratios, seconds = time_ratios(calls, turns)
        row: dict = {title: f'{name}, batch {batch}, {"training" if training else "inference"}'}
        for label, _, compiled in kinds:
            base = 'plain, compiled' if compiled else 'plain'
            row[label] = (f'{batch / seconds / ratios[label]:.0f} ({ratios[base] / ratios[label]:.3f}; '
                          f'{peaks[label] / 1e9:.2f} GB, {peaks[label] / peaks[base]:.3f})')
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    parts: dict[str, Callable[[int], list[dict]]] = {
        'kept': lambda turns: measure_kept((224, 160)),
        'places': measure_places,
        'training': measure_training,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=parts, default=list(parts), help='what to measure on a CPU')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where to measure')
    parser.add_argument('--batches', type=int, nargs='+', default=[256], help='batch sizes on a GPU')
    parser.add_argument('--compile', action='store_true', help='on a GPU: compiled models, too')
    parser.add_argument('--turns', type=int, default=80, help='turns at batch 1; larger batches have fewer')
    parser.add_argument('--default-allocator', action='store_true', help='let glibc return freed memory')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU.')

    allocator = 'glibc as it is'
    if not args.default_allocator:
        allocator = 'freed memory kept (mallopt)' if keep_freed_memory() else 'not glibc'
    if args.device == 'cuda':
        head = f'{gpu()}; {machine()}; 224 px'
        tables = [measure_gpu(args.turns, args.batches, args.compile)]
    else:
        head = f'{machine()}, float32 unless said, 224 px unless said; allocator: {allocator}'
        tables = [parts[part](args.turns) for part in args.only]
    print(head)
    for rows in tables:
        print('\n' + table([{COLUMNS.get(key, key): value for key, value in row.items()} for row in rows]))


if __name__ == '__main__':
    main()
