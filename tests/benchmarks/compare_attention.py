"""The attentions of the paper side by side, in the same places of ResNet-50 and MobileNetV2.

    python tests/benchmarks/compare_attention.py

Parameters, multiply-adds (224 px), bytes kept for backward per image, and time beside the plain model: the models take
turns in one process, and each ratio is the median of those of the turns.
"""
import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn as nn

import timm_eca
from timm_eca.attention import ATTENTIONS
from timm_eca.complexity import count_complexity


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the tensors that a forward pass keeps for backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(x)
    del output
    return sum(storages.values())


def time_ratios(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The median over the turns of each call's time, relative to the first call's in the same turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first is to warm up
                times[name].append(time.perf_counter() - start)
    base = times[next(iter(calls))]
    return {name: statistics.median(t / b for t, b in zip(taken, base)) for name, taken in times.items()}


def compare(base: str, twin: str, batch: int, size: int, turns: int) -> list[dict]:
    """A row for the plain model and for each attention that fits it."""
    x = torch.randn(batch, 3, size, size)
    models: dict[str, nn.Module] = {'none': timm.create_model(base)}
    counts = {'none': count_complexity(timm.create_model(base, device='meta'))}
    for attn in ATTENTIONS:
        try:
            models[attn] = timm.create_model(twin, attn=attn)
        except ValueError as e:
            print(f'{twin}, {attn}: left out, {e}')
            continue
        counts[attn] = count_complexity(timm.create_model(twin, attn=attn, device='meta'))

    def infer(model: nn.Module) -> None:
        with torch.inference_mode():
            model.eval()(x)

    def train(model: nn.Module) -> None:
        model.zero_grad()
        model.train()(x).sum().backward()

    kept = {attn: kept_bytes(model, x) // batch for attn, model in models.items()}
    inference = time_ratios({attn: lambda m=model: infer(m) for attn, model in models.items()}, turns)
    training = time_ratios({attn: lambda m=model: train(m) for attn, model in models.items()}, turns)
    return [{
        'model': base, 'attention': attn, 'parameters': counts[attn].params,
        'of the attention': counts[attn].params - counts['none'].params,
        'multiply-adds': counts[attn].multiply_adds, 'kept MB/image': round(kept[attn] / 1e6, 1),
        'inference': round(inference[attn], 2), 'training': round(training[attn], 2),
    } for attn in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    args = parser.parse_args()
    machine = (f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch '
               f'{torch.__version__}, timm {timm.__version__}, timm_eca {timm_eca.__version__}, float32, batch '
               f'{args.batch}, {args.size} px, {args.turns} turns')
    rows = [row for base, twin in (('resnet50', 'eca_resnet50'), ('mobilenetv2_100', 'eca_mobilenetv2'))
            for row in compare(base, twin, args.batch, args.size, args.turns)]
    if args.json:
        print(json.dumps({'machine': machine, 'rows': rows}, indent=2))
        return
    print(machine)
    print('| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for row in rows:
        cells = (f'{value:,}' if isinstance(value, int) else str(value) for value in row.values())
        print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
