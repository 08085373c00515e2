"""Cost of ECA in training by batch size, image size, depth and processes, relative to the plain timm model.

    python tests/benchmarks/scale.py

Each row changes one of these: ResNet-18, 8 images of 128 px, one process. Several processes train with
DistributedDataParallel over gloo and share the threads of the machine. Memory is activation memory.
"""
import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cost_of_eca import COLUMNS, make, train
from measure import kept_bytes, machine, share_weights, table, time_ratios
from torch.nn.parallel import DistributedDataParallel

from timm_eca import set_fused
from timm_eca.commands.process import keep_freed_memory

KINDS = ('plain', 'again', 'timm', 'timm_eca')
BASE = {'depth': 18, 'batch': 8, 'image size': 128, 'processes': 1}
ROWS = {
    'batch': (1, 4, 16, 64, 256),
    'image size': (96, 160, 224, 384, 512),
    'depth': (18, 34, 50, 101, 152),
    'processes': (1, 2, 4),
}


def measure(depth: int, batch: int, image_size: int, turns: int, processes: int = 1) -> dict:
    """The row of a training step."""
    name = f'eca_resnet{depth}'
    models = {kind: make(kind, name).train() for kind in KINDS}
    share_weights(models)
    x = torch.randn(batch, 3, image_size, image_size)
    kept = {}
    for kind, model in models.items():
        set_fused(kind == 'timm_eca')
        kept[kind] = kept_bytes(model, x)
    if processes > 1:
        models = {kind: DistributedDataParallel(model) for kind, model in models.items()}
    ratios, seconds = time_ratios({kind: partial(train, kind, model, x) for kind, model in models.items()}, turns)
    row: dict = {'plain, ms': f'{seconds * 1e3:.0f}'}
    row.update({f'{COLUMNS.get(kind, kind)}: time': f'{ratios[kind]:.3f}' for kind in KINDS[1:]})
    row.update({f'{COLUMNS.get(kind, kind)}: memory': f'{kept[kind] / kept["plain"]:.4f}' for kind in KINDS[2:]})
    return row


def measure_in_group(rank: int, processes: int, threads: int, args: tuple, folder: Path) -> None:
    """Measures in one of several new processes. The first process writes its row into the folder."""
    keep_freed_memory()
    torch.set_num_threads(max(1, threads // processes))
    dist.init_process_group('gloo', f'file://{folder}/group', rank=rank, world_size=processes)
    row = measure(*args, processes=processes)
    if rank == 0:
        (folder / 'row.json').write_text(json.dumps(row), encoding='utf-8')
    dist.destroy_process_group()


def measure_setting(setting: dict[str, int], turns: int) -> dict:
    """The row of a training step, from new processes: a process keeps the memory that it has freed."""
    args = (setting['depth'], setting['batch'], setting['image size'], turns)
    processes = setting['processes']
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(measure_in_group, (processes, torch.get_num_threads(), args, folder), nprocs=processes)
        return json.loads((folder / 'row.json').read_text(encoding='utf-8'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=ROWS, default=list(ROWS), help='what to change (default: all)')
    parser.add_argument('--least', type=int, default=0, help='skip smaller values')
    parser.add_argument('--turns', type=int, default=15, help='turns; a third of them for slow steps')
    args = parser.parse_args()
    print(f'{machine()}; float32, contiguous, training; else {", ".join(f"{k} {v}" for k, v in BASE.items())}\n')
    rows = []
    for name in args.only:
        for value in (value for value in ROWS[name] if value >= args.least):
            setting = {**BASE, name: value}
            long = setting['batch'] * setting['image size'] ** 2 * setting['depth'] > 20 * 8 * 128 ** 2 * 18
            rows.append({'training step': f'{name} {value}', **measure_setting(
                setting, max(3, args.turns // 3) if long else args.turns)})
            print(rows[-1], file=sys.stderr)
    print(table(rows))


if __name__ == '__main__':
    main()
