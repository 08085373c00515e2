"""The model card of fine-tuned weights."""
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from string import Template
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from timm.models import is_model

from timm_eca.conversion.card import CITATION, render_details, render_usage
from timm_eca.conversion.complexity import count_complexity
from timm_eca.weights.key_maps import kernel_sizes_of

__all__ = ['render_finetuned_card']

_CARD = Template('''\
---
$metadata
---
# Model card for $name

`$model`, fine-tuned on $data_name: top-1 $top1 %, top-5 $top5 % on $val_count validation images.

$usage
## Model details

$details

`timm-eca verify local-dir:.` checks these files against the digests that were recorded when they were written.

## Training

From $start, on $train_images of $data_name, in $epochs epochs. The weights are those of epoch
$best_epoch, which had the highest validation accuracy.

```
$command
```

| epoch | learning rate | training loss | validation loss | top-1 (%) | top-5 (%) |
|---|---|---|---|---|---|
$rows

![Losses and accuracies over the epochs](curves.png)

## Results

On the $val_count validation images, which chose the epoch as well, so the accuracy on other images is likely to be
lower: top-1 $top1 %, top-5 $top5 %.

$per_class
![Confusion matrix](confusion_matrix.png)

## Limits

The network knows these $num_classes classes only and gives one of them for any image. It was measured on nothing but
the validation images. The terms of the weights that it started from, and of the images, apply.

$citation''')


def render_finetuned_card(
        network: nn.Module,
        config: Mapping[str, Any],
        start: str,
        data_name: str,
        history: Sequence[Mapping[str, float]],
        best: Mapping[str, float],
        targets: Sequence[int],
        predictions: Sequence[int],
        train_count: int | None,
        command: str,
) -> str:
    """The card of fine-tuned weights, as Markdown with the Hub's metadata before it.

    Args:
        network: The model. The license and the repository of the weights that it started from are those of its
            `pretrained_cfg`.
        config: Its `config.json`.
        start: Where its weights were from before, in words.
        data_name: Name of the images.
        history: The epochs.
        best: The epoch that was kept.
        targets: Classes of the validation images.
        predictions: What the model takes them for.
        train_count: Number of images to train on, where it is known.
        command: What the run was told.
    """
    origin: Any = network.pretrained_cfg  # of the weights that the training started from
    cfg, model, names = config['pretrained_cfg'], config['architecture'], config['label_names']
    complexity = count_complexity(deepcopy(network).to('meta'), tuple(cfg['input_size']))
    sizes = kernel_sizes_of(network.state_dict())
    name = f'{model}.{"-".join(data_name.split("/"))}'
    top1, top5 = f'{best["top1"]:.2f}', f'{best["top5"]:.2f}'
    listed = ', '.join(names[:20]) + (f' and {len(names) - 20} more (see config.json)' if len(names) > 20 else '')
    return _CARD.substitute(
        metadata=ModelCardData(
            license=origin.get('license'),
            base_model=origin.get('hf_hub_id'),
            library_name='timm',
            pipeline_tag='image-classification',
            tags=['timm', *(['eca', 'channel-attention'] if sizes else []), 'image-classification'],
            model_name=name,
            eval_results=[
                EvalResult(
                    task_type='image-classification', dataset_type=data_name, dataset_name=data_name,
                    dataset_split='validation', metric_type='accuracy', metric_name=f'{metric} accuracy',
                    metric_value=round(best[key], 2))
                for metric, key in (('Top-1', 'top1'), ('Top-5', 'top5'))
            ],
        ).to_yaml(),
        name=name,
        model=model,
        data_name=data_name,
        top1=top1,
        top5=top5,
        val_count=f'{len(targets):,}',
        usage=render_usage(model, cfg, len(names)) if is_model(model) else '',
        details=render_details(
            model, cfg, complexity, ', '.join(map(str, sizes)) or 'none, this model has no ECA',
            f'{len(names):,}: {_escape(listed)}'),
        num_classes=f'{len(names):,}',
        start=start,
        train_images='the images' if train_count is None else f'{train_count:,} images',
        command=command,
        epochs=len(history),
        best_epoch=best['epoch'],
        rows='\n'.join(
            f'| {row["epoch"]} | {row["lr"]:.2e} | {row["train_loss"]:.4f} | {row["loss"]:.4f} | {row["top1"]:.2f} '
            f'| {row["top5"]:.2f} |' for row in history),
        per_class=_per_class(names, targets, predictions),
        citation=CITATION,
    )


def _per_class(names: Sequence[str], targets: Sequence[int], predictions: Sequence[int]) -> str:
    if len(names) > 50:
        return ''
    count, hits = Counter(targets), Counter(t for t, p in zip(targets, predictions) if t == p)
    rows = [
        f'| {_escape(name)} | {count[index]} | {f"{100 * hits[index] / count[index]:.1f}" if count[index] else "-"} |'
        for index, name in enumerate(names)
    ]
    return '\n'.join(['| class | images | found (%) |', '|---|---|---|', *rows, ''])


def _escape(text: str) -> str:
    """Text that may come from a folder's name, fit for Markdown."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')
