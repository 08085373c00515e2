"""What ECA gives a fine-tuned MobileNetV2: plain, ECA and SE from the same weights on the same images.

    python tests/benchmarks/what_eca_gives.py --data sign-language-digits --weights mobilenetv2_backbone.pt

Every variant starts as the plain network (a warm start), with the same classifier. With the same seed, all train on the
same images, in the same order, with the same crops, and are tested on the same images: all that were not trained on.
Nothing is chosen by them: the weights of the last epoch count. The recipe is that of `timm-eca finetune`.

A variant is `plain`, or an attention of `timm_eca.add_attn` (`eca`, `se`, ...), then `-K` for a fixed kernel size (else
the paper's formula), then `@SCALE` for the attention's learning rate as a multiple of the network's (else 10).

Each run is added to a file (JSON lines) when it ends; the same command goes on from there.
"""
import argparse
import json
import random
import re
import shlex
import statistics
import sys
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

import timm_eca
from timm_eca.commands.process import keep_freed_memory

LR, WEIGHT_DECAY, ATTN_LR_SCALE, BATCH_SIZE = 1e-3, 0.05, 10.0, 32  # defaults of `timm-eca finetune`


class Images:
    """A folder of images by class, read once: PIL images to train on, and a tensor to test on."""

    def __init__(self, folder: str, img_size: int) -> None:
        dataset = ImageDataset(folder)
        self.images, targets = zip(*dataset)
        self.targets, self.classes = torch.tensor(targets), max(targets) + 1
        config = resolve_data_config(
            {'input_size': (3, img_size, img_size)}, model=timm.create_model('mobilenetv2_100', device='meta'))
        self.augment: Any = create_transform(**{**config, 'interpolation': 'random'}, is_training=True, scale=(0.35, 1))
        preprocess: Any = create_transform(**config)
        self.pixels = torch.stack([preprocess(image) for image in self.images])

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


def create(variant: str, weights: dict[str, torch.Tensor], classes: int, seed: int) -> tuple[nn.Module, float]:
    """A variant with the plain weights, and the scale of its attention's learning rate."""
    match = re.fullmatch(r'(?P<attn>\w+)(-(?P<size>\d+))?(@(?P<scale>[\d.]+))?', variant)
    if match is None:
        sys.exit(f'{variant} is not a variant: name plain, eca, eca-3, se@1, ...')
    torch.manual_seed(seed)  # all have the same classifier
    model = timm.create_model('mobilenetv2_100')
    model.reset_classifier(classes)
    model.load_state_dict({**weights, **{f'classifier.{k}': v for k, v in model.classifier.state_dict().items()}})
    if match['attn'] != 'plain':
        timm_eca.add_attn(model, match['attn'], int(match['size']) if match['size'] else 'adaptive')
    return model.to(memory_format=torch.channels_last), float(match['scale'] or ATTN_LR_SCALE)


def train(model: nn.Module, images: Images, indices: torch.Tensor, scale: float, epochs: int, seed: int) -> None:
    """AdamW, cosine with a warm-up of a tenth, label smoothing, random crops."""
    updates = len(indices) // BATCH_SIZE
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=LR, weight_decay=WEIGHT_DECAY,
        param_group_fn=partial(timm_eca.param_groups, lr=LR, weight_decay=WEIGHT_DECAY, attn_lr_scale=scale))
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, min_lr=0, warmup_lr=LR / 100,
        warmup_epochs=epochs / 10 if epochs / 10 * updates >= 2 else 0, step_on_epochs=False, updates_per_epoch=updates)
    random.seed(seed)  # the crops draw from both
    torch.manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        batches = indices[torch.randperm(len(indices))].split(BATCH_SIZE)[:updates]
        for step, batch in enumerate(batches, epoch * updates + 1):
            x = torch.stack([images.augment(images.images[i]) for i in batch.tolist()])
            logits = model(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, images.targets[batch], label_smoothing=0.1).backward()
            optimizer.step()
            scheduler.step_update(step)


def test(model: nn.Module, images: Images, indices: torch.Tensor) -> dict[str, float]:
    """Top-1 (%), cross entropy, and ECA's channel weights: their range and deviation between images."""
    pixels, targets = images.pixels[indices].contiguous(memory_format=torch.channels_last), images.targets[indices]
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


def interval(values: list[float], digits: int = 2) -> str:
    """The mean and half the width of its 95 % confidence interval (Student's t)."""
    if len(values) < 2:
        return ', '.join(f'{value:.{digits}f}' for value in values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f'{statistics.mean(values):.{digits}f} ± {half:.{digits}f}'


def summary(runs: list[dict[str, Any]], variants: list[str]) -> str:
    """Markdown: a row for each variant. Differences to plain are those of runs with the same seed."""
    rows, plain = [], {run['seed']: run for run in runs if run['variant'] == 'plain'}
    for variant in variants:
        own = [run for run in runs if run['variant'] == variant]
        pairs = [(run, plain[run['seed']]) for run in own if run['seed'] in plain and variant != 'plain']
        low, high, std = ([x[key] for x in own if key in x] for key in ('gate_min', 'gate_max', 'gate_std'))
        rows.append({
            'variant': variant, 'seeds': len(own), 'top-1 (%)': interval([run['top1'] for run in own]),
            'difference to plain': interval([a['top1'] - b['top1'] for a, b in pairs]),
            'better in': f'{sum(a["top1"] > b["top1"] for a, b in pairs)} of {len(pairs)}' if pairs else '',
            'loss': interval([run['loss'] for run in own], 3),
            'loss, difference': interval([a['loss'] - b['loss'] for a, b in pairs], 3),
            'channel weights': f'{min(low):.2f} to {max(high):.2f}' if std else '',
            'their standard deviation': f'{statistics.mean(std):.3f}' if std else '',
        })
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='a folder with a folder of images for each class')
    parser.add_argument('--weights', required=True, help='a plain MobileNetV2 without classifier')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--seeds', type=int, default=10)
    parser.add_argument('--images-per-class', type=int, default=15, help='to train on; 0 for 80 %% of all')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--variants', nargs='+', default=['plain', 'eca', 'se', 'eca-3', 'eca-5', 'eca-7', 'eca-9'])
    parser.add_argument('--json', type=Path, default=Path('what_eca_gives.jsonl'), help='the file of the runs')
    args = parser.parse_args()
    keep_freed_memory()
    images = Images(args.data, args.img_size)
    weights = timm_eca.to_timm(torch.load(args.weights, map_location='cpu', weights_only=True))
    setting = {name: getattr(args, name) for name in ('img_size', 'images_per_class', 'epochs')}
    runs = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    runs = [run for run in runs if setting.items() <= run.items() and run['seed'] < args.seeds]
    for seed in range(args.seeds):  # one that is stopped has all variants of the seeds before
        trained, tested = images.split(seed, args.images_per_class)
        for variant in args.variants:
            if any((run['seed'], run['variant']) == (seed, variant) for run in runs):
                continue
            model, scale = create(variant, weights, images.classes, seed)
            train(model, images, trained, scale, args.epochs, seed)
            run = {'variant': variant, 'seed': seed, **setting, **test(model, images, tested)}
            runs.append(run)
            with args.json.open('a') as file:
                file.write(json.dumps(run) + '\n')
            print(f'{variant}, seed {seed}: {run["top1"]:.2f} %', file=sys.stderr)
    print(f'{machine()}, {len(trained)} images to train on, {len(tested)} to test on:\n'
          f'`python {shlex.join(sys.argv)}`\n\n{summary(runs, args.variants)}')


if __name__ == '__main__':
    main()
