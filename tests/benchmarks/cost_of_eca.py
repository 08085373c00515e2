"""What ECA costs beside the plain timm model: timm's own ECA layer, module by module, and norm and ECA as one.

    python tests/benchmarks/cost_of_eca.py
    python tests/benchmarks/cost_of_eca.py --only kept inference places training --default-allocator
    python tests/benchmarks/cost_of_eca.py --only compiled --json
    python tests/benchmarks/cost_of_eca.py --device cuda

- `plain`: the timm model, to which all others are compared.
- `timm`: `timm.layers.EcaModule` in the same places, same kernel sizes.
- `reference`: `timm_eca` with that switched off, one module after the other.
- `timm_eca`: as it is.

They take turns in one process, on the same weights, in changing order; a ratio is the median of those of the turns.
`again` is the plain model a second time: how far it is from 1 is how far to trust the others.
"""
import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

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


def make_all(name: str, memory_format: torch.memory_format, kinds: tuple[str, ...] = KINDS) -> dict[str, nn.Module]:
    models = {kind: make(kind, name).to(memory_format=memory_format) for kind in kinds}
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
    """Bytes kept for backward by one image, MB."""
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


def measure_time(
        title: str,
        step: Callable[[str, nn.Module, torch.Tensor], None],
        training: bool,
        batches: tuple[int, ...],
        turns: int,
        compiled: bool = False,
) -> list[dict]:
    """Ratios of the time of a step to the plain model's, by model, batch size and memory format."""
    # Compiled, nothing is fused by us: timm_eca is the reference there.
    kinds = tuple(kind for kind in KINDS if not (compiled and kind == 'reference'))
    formats = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
    rows = []
    for name, batch, label in itertools.product(TIMED, batches, ('contiguous',) if compiled else formats):
        torch._dynamo.reset()
        models = make_all(name, formats[label], kinds)
        x = torch.randn(batch, 3, 224, 224).to(memory_format=formats[label])
        calls = {}
        for kind, model in models.items():
            model.train(training)
            call = torch.compile(model, fullgraph=True) if compiled else model
            calls[kind] = partial(step, kind, call, x)
        ratios, seconds = time_ratios(calls, max(8, turns // batch))
        row: dict = {title: f'{name}, batch {batch}, {label}', 'plain, ms': round(seconds * 1e3, 1)}
        row.update({kind: f'{ratio:.3f}' for kind, ratio in ratios.items() if kind != 'plain'})
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def measure_places(batches: tuple[int, ...], turns: int) -> list[dict]:
    """Time that the norms with ECA behind them take within a network in inference, beyond what the plain norms take.

    Relative to the plain model's whole time: less noisy than whole models, blind to what ECA does to its neighbours.
    """
    rows = []
    formats = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
    for name, batch, label in itertools.product(TIMED, batches, formats):
        models = make_all(name, formats[label])
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
        x = torch.randn(batch, 3, 224, 224).to(memory_format=formats[label])
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


def run_python(code: str, *args: str) -> float:
    """The last line that a fresh Python process prints, a number."""
    # Compiled once, as where the package is installed.
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p), 'PYTHONDONTWRITEBYTECODE': ''}
    return float(subprocess.check_output([sys.executable, '-c', code, *args], env=env, text=True).split()[-1])


# Not ru_maxrss, which begins at what the process that started this one had.
PEAK = 'print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))'

TRAINING_STEP = f'''
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cost_of_eca import make, train
kind, name = sys.argv[1:]
model = make(kind, name).train()
for _ in range(2):
    train(kind, model, torch.randn(16, 3, 224, 224))
{PEAK}
'''

IMPORT = '''
import time, timm
start = time.perf_counter()
import timm_eca
print((time.perf_counter() - start) * 1e3)
'''

CREATE = '''
import statistics, sys, time, timm, timm_eca
names = sys.argv[1:]
ratios = []
for turn in range(12):
    times = []
    for name in names:
        start = time.perf_counter()
        timm.create_model(name)
        times.append(time.perf_counter() - start)
    ratios.append(times[0] / times[1])
print(statistics.median(ratios[2:]))
'''

IMPORT_CONVERTER = f'import timm_eca.conversion.convert, sys\n{PEAK}'

CONVERT = f'''
import sys
from timm_eca.commands.main import main
main(['convert', sys.argv[1], '--output', sys.argv[2]])
{PEAK}
'''


def measure_peaks() -> list[dict]:
    """Peak resident memory of a process that takes two training steps, MB."""
    rows = []
    for name in MODELS:
        row: dict = {'peak RSS, training, batch 16, MB': name}
        peaks = {kind: run_python(TRAINING_STEP, kind, name) / 1e6 for kind in KINDS}
        row.update({kind: f'{peak:.0f} ({peak / peaks["plain"]:.3f})' for kind, peak in peaks.items()})
        rows.append(row)
    return rows


def measure_setup() -> list[dict]:
    """Import, creation and conversion."""
    seconds = min(run_python(IMPORT) for _ in range(5))
    rows: list[dict] = [{'set-up': '`import timm_eca` after timm, ms', 'value': round(seconds, 1)}]
    rows += [{
        'set-up': f'`create_model`, {name} / {base}', 'value': round(run_python(CREATE, name, base), 3),
    } for name, base in MODELS.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'eca_resnet152_k3357.pth.tar'
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from helpers.official_files import official_state_dict, save_official
        save_official(path, official_state_dict('eca_resnet152'))
        peak = run_python(CONVERT, str(path), str(Path(folder) / 'out')) - run_python(IMPORT_CONVERTER)
        rows.append({
            'set-up': 'conversion of ResNet-152: peak memory beyond the imports / file size',
            'value': round(peak / path.stat().st_size, 2)})
    return rows


# On a GPU, in the same turns: name of the column, kind of the model, compiled.
GPU_KINDS = (
    ('plain', 'plain', False), ('again', 'plain', False), ('timm', 'timm', False), ('reference', 'reference', False),
    ('timm_eca', 'timm_eca', False), ('plain, compiled', 'plain', True), ('timm_eca, compiled', 'timm_eca', True),
)


def gpu() -> str:
    """The card, its driver, and the versions that its kernels depend on."""
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


def measure_gpu(turns: int, batch: int = 256, device: str = 'cuda', image_size: int = 224) -> list[dict]:
    """Images per second and peak memory, bf16, channels_last; compiled ones relative to the compiled plain model."""
    title = 'bf16, channels_last: images/s (relative; peak memory, relative)'
    rows = []
    for name, training in itertools.product(TIMED, (False, True)):
        torch._dynamo.reset()
        models = {label: make(kind, name).to(device, memory_format=torch.channels_last) for label, kind, _ in GPU_KINDS}
        share_weights(models)
        x = torch.randn(batch, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
        calls: dict[str, Callable[[], object]] = {}
        peaks = {}
        for label, kind, compiled in GPU_KINDS:
            model = models[label].train(training)
            call = torch.compile(model, fullgraph=True) if compiled else model
            calls[label] = partial(gpu_step, kind, model, call, x)
            for _ in range(2):  # the first one compiles, and chooses algorithms
                if x.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                calls[label]()
            peaks[label] = torch.cuda.max_memory_allocated() if x.is_cuda else 1
            model.zero_grad()
        ratios, seconds = time_ratios(calls, turns)
        row: dict = {title: f'{name}, batch {batch}, {"training" if training else "inference"}'}
        for label, _, compiled in GPU_KINDS:
            base = 'plain, compiled' if compiled else 'plain'
            row[label] = (f'{batch / seconds / ratios[label]:.0f} ({ratios[base] / ratios[label]:.3f}; '
                          f'{peaks[label] / 1e9:.2f} GB, {peaks[label] / peaks[base]:.3f})')
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('kept', 'inference', 'places', 'training', 'compiled', 'peak', 'setup')
    parser.add_argument('--only', nargs='+', choices=parts, help='parts of the measurement on a CPU, all unless given')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where to measure')
    parser.add_argument('--turns', type=int, default=80, help='turns at batch 1; fewer at larger ones')
    parser.add_argument('--default-allocator', action='store_true', help='let glibc give freed memory back')
    parser.add_argument('--json', action='store_true', help='print JSON instead of tables')
    args = parser.parse_args()
    if args.device == 'cuda' and (args.only or not torch.cuda.is_available()):
        parser.error('--device cuda needs a GPU, and measures all there is to measure there (no --only).')

    allocator = 'glibc as it is'
    if not args.default_allocator:
        allocator = 'freed memory kept (mallopt)' if keep_freed_memory() else 'not glibc'
    measures: dict[str, Callable[[], list[dict]]] = {
        'kept': lambda: measure_kept((224, 160)),
        'inference': lambda: measure_time('eager inference', infer, False, (1, 8, 32), args.turns),
        'places': lambda: measure_places((1, 8, 32), args.turns),
        'training': lambda: measure_time('eager training step', train, True, (8,), args.turns),
        'compiled': lambda: [
            *measure_time('compiled inference', infer, False, (8,), args.turns, compiled=True),
            *measure_time('compiled training step', train, True, (8,), args.turns, compiled=True)],
        'peak': measure_peaks,
        'setup': measure_setup,
    }
    if args.device == 'cuda':
        head = f'{gpu()}; {machine()}; 224 px'
        results = {'cuda': measure_gpu(args.turns)}
    else:
        head = f'{machine()}, float32 unless said, 224 px unless said; allocator: {allocator}'
        results = {part: measures[part]() for part in parts if part in (args.only or parts)}
    if args.json:
        print(json.dumps({'machine': head, **results}, indent=2))
        return
    print(head)
    for rows in results.values():
        titles = {next(iter(row)) for row in rows}
        for title in sorted(titles):
            named = [{COLUMNS.get(key, key): value for key, value in row.items()} for row in rows if title in row]
            print('\n' + table(named))


if __name__ == '__main__':
    main()
