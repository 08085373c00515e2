"""Accuracy of a fine-tuned MobileNetV2: plain, with ECA and with SE, from the same weights on the same images.

    python tests/benchmarks/what_eca_gives.py --data sign-language-digits --weights mobilenetv2_backbone.pt

All variants start as the same plain network with the same classifier, and train with the recipe of `timm-eca finetune`.
A seed draws the training images, the batches and the crops, and all variants of a seed share them. All other images are
tested, after the last epoch. Nothing is chosen by the test images.

A variant is `plain` or an attention of `timm_eca.add_attn` (`eca`, `se`, ...). `-K` sets the kernel size. `@SCALE` sets
the attention's learning rate, relative to the network's (1 without `@`). An example: `eca-3@10`.

Each trained model is tested three times, with three kinds of statistics in its norms:
- `running`: the running averages of training.
- `crops`: computed again by `update_bn` from the augmented training images of the last epoch.
- `resized`: computed again by `update_bn` from the same training images, prepared as test images are.

The script writes each run to a file (JSON lines) when it ends, and skips the runs that it finds there.
"""
import argparse
import itertools
import json
import random
import re
import shlex
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from measure import machine, table
from scipy import stats
from timm.data import ImageDataset, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.optim.swa_utils import update_bn

import timm_eca
from timm_eca.commands.process import keep_freed_memory

LR, WEIGHT_DECAY, BATCH_SIZE = 1e-3, 0.05, 32  # defaults of `timm-eca finetune`
KINDS = ('running', 'crops', 'resized')
RESULTS = ('top1', 'loss', 'gate_min', 'gate_max', 'gate_std')
Batches = list[tuple[torch.Tensor, torch.Tensor]]  # images (N, 3, H, W), their indices (N,)
Runs = dict[int, dict[str, float]]  # results by seed


class Images:
    """A folder of images by class: PIL images to train on, a tensor to test on."""

    def __init__(self, folder: str, classes: list[str] | None, img_size: int) -> None:
        class_map: Any = {name: label for label, name in enumerate(classes or ())}
        self.images, targets = zip(*ImageDataset(folder, class_map=class_map))
        self.targets, self.classes = torch.tensor(targets), max(targets) + 1
        config = resolve_data_config(
            {'input_size': (3, img_size, img_size)}, model=timm.create_model('mobilenetv2_100', device='meta'))
        self.augment: Any = create_transform(**{**config, 'interpolation': 'random'}, is_training=True, scale=(0.35, 1))
        preprocess: Any = create_transform(**config)
        self.pixels = torch.stack([preprocess(image) for image in self.images])
        self.pixels = self.pixels.contiguous(memory_format=torch.channels_last)

    def split(self, seed: int, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices to train and to test on; 0 images per class stands for 80 % of each class."""
        generator, train, test = torch.Generator().manual_seed(seed), [], []
        for label in range(self.classes):
            own = (self.targets == label).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=generator)]
            count = per_class or round(0.8 * len(own))
            train.append(own[:count])
            test.append(own[count:])
        return torch.cat(train), torch.cat(test)

    def batches(self, indices: torch.Tensor, seed: int) -> Batches:
        """The augmented images of an epoch, without the rest that fills no batch."""
        random.seed(seed)  # timm's crops draw from both
        torch.manual_seed(seed)
        full = [part for part in indices[torch.randperm(len(indices))].split(BATCH_SIZE) if len(part) == BATCH_SIZE]
        crops = [torch.stack([self.augment(self.images[i]) for i in part.tolist()]) for part in full]
        return [(x.contiguous(memory_format=torch.channels_last), part) for x, part in zip(crops, full)]


def create(variant: str, weights: dict[str, torch.Tensor], classes: int, seed: int) -> tuple[nn.Module, float]:
    """A variant with the plain weights, and the scale of its attention's learning rate."""
    match: Any = re.fullmatch(r'(?P<attn>\w+)(-(?P<size>\d+))?(@(?P<scale>[\d.]+))?', variant)
    if match is None:
        sys.exit(f'{variant} is not a variant: name plain, eca, eca-3, se@10, ...')
    torch.manual_seed(seed)  # all have the same classifier
    model = timm.create_model('mobilenetv2_100')
    model.reset_classifier(classes)
    model.load_state_dict({**weights, **{f'classifier.{k}': v for k, v in model.classifier.state_dict().items()}})
    if match['attn'] != 'plain':
        timm_eca.add_attn(model, match['attn'], int(match['size']) if match['size'] else 'adaptive')
    return model.to(memory_format=torch.channels_last), float(match['scale'] or 1)


def train(model: nn.Module, epochs: list[Batches], targets: torch.Tensor, scale: float) -> None:
    """AdamW, cosine with a warm-up of a tenth, label smoothing."""
    updates, warmup = len(epochs[0]), len(epochs) / 10
    groups = partial(timm_eca.param_groups, lr=LR, weight_decay=WEIGHT_DECAY, attn_lr_scale=scale)
    optimizer = create_optimizer_v2(model, 'adamw', lr=LR, weight_decay=WEIGHT_DECAY, param_group_fn=groups)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=len(epochs), min_lr=0, warmup_lr=LR / 100,
        warmup_epochs=warmup if warmup * updates >= 2 else 0, step_on_epochs=False, updates_per_epoch=updates)
    model.train()
    for step, (x, indices) in enumerate((batch for epoch in epochs for batch in epoch), 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), targets[indices], label_smoothing=0.1).backward()
        optimizer.step()
        scheduler.step_update(step)


def test(model: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Top-1 (%), cross entropy, and ECA's channel weights: their range and deviation between images."""
    with torch.inference_mode():
        model.eval()
        logits = torch.cat([model(x) for x in pixels.split(128)])
    result = {
        'top1': 100 * (logits.argmax(1) == targets).double().mean().item(),
        'loss': nn.functional.cross_entropy(logits, targets).item()}
    if any(isinstance(module, timm_eca.EfficientChannelAttention) for module in model.modules()):
        sample = pixels[::max(1, len(pixels) // 200)]  # of all classes
        gates = torch.cat([*timm_eca.gates(model, sample).values()], 1)  # (images, channels of all layers)
        result.update(gate_min=gates.min().item(), gate_max=gates.max().item(), gate_std=gates.std(0).mean().item())
    return result


def interval(values: list[float], form: str = '.2f') -> str:
    """The mean and half the width of its 95 % confidence interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f'{statistics.mean(values):{form}} ± {half:{form.removeprefix("+")}}'


def differences(own: Runs, base: Runs) -> tuple[str, str]:
    """Differences between runs of the same seed: top-1 (in how many seeds it is higher), and loss."""
    if own is base:
        return '', ''
    top1, loss = ([run[key] - base[seed][key] for seed, run in own.items()] for key in ('top1', 'loss'))
    return f'{interval(top1, "+.2f")} ({sum(value > 0 for value in top1)} of {len(top1)})', interval(loss, '+.3f')


def summary(runs: dict[tuple[str, str], Runs], variants: list[str]) -> str:
    """Markdown: a row for each variant and kind of statistics."""
    rows = []
    for variant, kind in itertools.product(variants, KINDS):
        own = runs[variant, kind]
        top1, loss, *gates = ([run[key] for run in own.values() if key in run] for key in RESULTS)
        to_plain, to_running = differences(own, runs['plain', kind]), differences(own, runs[variant, 'running'])
        rows.append({
            'variant': variant, 'statistics': kind, 'top-1 (%)': interval(top1), 'to plain (better in)': to_plain[0],
            'to running (better in)': to_running[0], 'loss': interval(loss, '.3f'), 'loss to plain': to_plain[1],
            'loss to running': to_running[1], 'channel weights (deviation)': (
                f'{min(gates[0]):.2f} to {max(gates[1]):.2f} ({statistics.mean(gates[2]):.4f})' if gates[0] else '')})
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='a folder with a folder of images for each class')
    parser.add_argument('--weights', required=True, help='a plain MobileNetV2 without classifier')
    parser.add_argument('--classes', nargs='+', help='names of the classes (default: all)')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--seeds', type=int, default=10, help='two or more')
    parser.add_argument('--images-per-class', type=int, default=16, help='to train on; 0 for 80 %% of all')
    parser.add_argument('--epochs', type=int, default=15)
    parser.add_argument('--variants', nargs='+', default=['plain', 'eca', 'eca@10', 'se'])
    parser.add_argument('--json', type=Path, default=Path('what_eca_gives.jsonl'), help='the file of the runs')
    args = parser.parse_args()
    keep_freed_memory()
    images = Images(args.data, args.classes, args.img_size)
    weights = timm_eca.to_timm(torch.load(args.weights, map_location='cpu', weights_only=True))
    setting = {name: getattr(args, name) for name in ('classes', 'img_size', 'images_per_class', 'epochs')}
    runs: dict[tuple[str, str], Runs] = defaultdict(dict)
    for run in map(json.loads, args.json.read_text().splitlines() if args.json.exists() else ()):
        if setting.items() <= run.items() and run['seed'] < args.seeds:
            runs[run['variant'], run['statistics']][run['seed']] = run
    for seed in range(args.seeds):  # if stopped, the file has all variants of the seeds before
        missing = [variant for variant in args.variants if seed not in runs[variant, 'running']]
        trained, tested = images.split(seed, args.images_per_class)
        epochs = [images.batches(trained, seed * 1000 + epoch) for epoch in range(args.epochs if missing else 0)]
        for variant in missing:
            model, scale = create(variant, weights, images.classes, seed)
            train(model, epochs, images.targets, scale)
            again: dict[str, Any] = {
                'crops': epochs[-1], 'resized': [images.pixels[indices] for _, indices in epochs[-1]]}
            for kind in KINDS:
                if kind in again:
                    update_bn(again[kind], model)
                runs[variant, kind][seed] = result = test(model, images.pixels[tested], images.targets[tested])
                print(f'{variant}, seed {seed}, {kind}: {result["top1"]:.2f} %', file=sys.stderr)
            done = [{'variant': variant, 'statistics': kind, 'seed': seed, **setting, **runs[variant, kind][seed]}
                    for kind in KINDS]
            with args.json.open('a') as file:
                file.write(''.join(json.dumps(run) + '\n' for run in done))
    steps = args.epochs * (len(trained) // BATCH_SIZE)
    print(f'{machine()}, {len(trained)} images to train on, {len(tested)} to test on, {steps} steps:\n'
          f'`python {shlex.join(sys.argv)}`\n\n{summary(runs, args.variants)}')


if __name__ == '__main__':
    main()
