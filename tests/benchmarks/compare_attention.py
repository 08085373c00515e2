"""Cost of all attention modules, in the same places of ResNet-50 and MobileNetV2.

    python tests/benchmarks/compare_attention.py

All are computed module by module. The table has parameters, multiply-adds (224 px), activation memory per image, and
times relative to the plain model.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
import torch.nn as nn
from cost_of_eca import infer, train
from helpers.complexity import count_complexity
from measure import kept_bytes, machine, share_weights, table, time_ratios

from timm_eca import set_fused
from timm_eca.commands.process import keep_freed_memory
from timm_eca.layers.attention import ATTENTIONS


def compare(base: str, twin: str, batch: int, size: int, turns: int) -> list[dict]:
    """A row for the plain model and for each attention that it has a place for."""
    x = torch.randn(batch, 3, size, size)
    models: dict[str, nn.Module] = {'none': timm.create_model(base)}
    counts = {'none': count_complexity(timm.create_model(base, device='meta'))}
    for attn in ATTENTIONS:
        try:
            models[attn] = timm.create_model(twin, attn_layer=attn)
        except ValueError as e:
            print(f'{twin}, {attn}: no place for it. {e}')
            continue
        counts[attn] = count_complexity(timm.create_model(twin, attn_layer=attn, device='meta'))

    set_fused(False)
    share_weights(models)
    kept = {attn: kept_bytes(model, x) // batch for attn, model in models.items()}
    training, _ = time_ratios({attn: partial(train, attn, model.train(), x) for attn, model in models.items()}, turns)
    inference, _ = time_ratios({attn: partial(infer, attn, model.eval(), x) for attn, model in models.items()}, turns)
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
    args = parser.parse_args()
    allocator = 'freed memory kept' if keep_freed_memory() else 'not glibc'
    rows = [row for base, twin in (('resnet50', 'eca_resnet50'), ('mobilenetv2_100', 'eca_mobilenetv2'))
            for row in compare(base, twin, args.batch, args.size, args.turns)]
    print(f'{machine()}, float32, batch {args.batch}, {args.size} px, {args.turns} turns; allocator: {allocator}\n')
    print(table(rows))


if __name__ == '__main__':
    main()
