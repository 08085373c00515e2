"""Shared by the benchmarks: timing in turns, activation memory, tables."""
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn as nn

import timm_eca

__all__ = ['kept_bytes', 'machine', 'share_weights', 'table', 'time_ratios']


def machine() -> str:
    """Processor, threads and versions."""
    model = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            model = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), model)
    return (f'{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}, '
            f'timm_eca {timm_eca.__version__}')


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, without parameters."""
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


def share_weights(models: dict[str, nn.Module]) -> None:
    """Makes all models use the parameters of the first, so that no model has a better place in memory."""
    first, *others = models.values()
    parameters = dict(first.named_parameters())
    for model in others:
        shared = {key: parameters.get(key.replace('.norm.', '.'), value) for key, value in model.state_dict().items()}
        model.load_state_dict(shared, assign=True)


def time_ratios(calls: dict[str, Callable[[], object]], turns: int) -> tuple[dict[str, float], float]:
    """Times several calls in turns. The order changes with each turn, and two turns warm up.

    Returns:
        For each call, the median over the turns of its time relative to the first call; the first call's time in s.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for turn in range(turns + 2):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    base = times[next(iter(calls))]
    ratios = {name: statistics.median(t / b for t, b in zip(taken, base)) for name, taken in times.items()}
    return ratios, statistics.median(base)


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ['| ' + ' | '.join(rows[0]) + ' |', '|' + '---|' * len(rows[0])]
    for row in rows:
        cells = (f'{value:,}' if isinstance(value, int) else str(value) for value in row.values())
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
