"""The model card of fine-tuned weights."""
from collections.abc import Mapping
from copy import deepcopy
from string import Template
from typing import Any

import torch.nn as nn
from timm.models import is_model

from timm_eca.analysis.evaluate import Evaluation
from timm_eca.conversion.card import CITATION, render_details, render_metadata, render_usage
from timm_eca.weights.key_maps import kernel_sizes_of

__all__ = ['render_finetuned_card']

_CARD = Template('''\
---
$metadata
---
# Model card for $name

`$model`, fine-tuned on $data_name: $accuracy on $val_count validation images.

$usage
## Model details

$details

`timm-eca verify local-dir:.` checks these files against the digests that were recorded when they were written.

## Training

From $start, on $train_images of $data_name, in $epochs epochs. The weights are those of epoch
$best_epoch, which had the highest validation accuracy. `metrics.csv` has the losses and accuracies of all.
The command:

```
$command
```

![Losses and accuracies over the epochs](curves.png)

## Results

On the $val_count validation images, which chose the epoch as well, so the accuracy on other images is likely to be
lower: $accuracy.

$per_class
![Confusion matrix](confusion_matrix.png)
$gates
## Limits

The network knows these $num_classes classes only and gives one of them for any image. It was measured on nothing but
the validation images. The terms of the weights that it started from, and of the images, apply.

$citation''')


def render_finetuned_card(
        network: nn.Module,
        config: Mapping[str, Any],
        start: str,
        data_name: str,
        epochs: int,
        best_epoch: int,
        evaluation: Evaluation,
        train_count: int,
        command: str,
        gates: str | None = None,
) -> str:
    """The card of fine-tuned weights, as Markdown with the Hub's metadata before it.

    Args:
        network: The model. Its `pretrained_cfg` has the license and the repository of the weights that it started from.
        config: Its `config.json`.
        start: What it was started from, in words.
        data_name: Name of the images.
        epochs: How many there were.
        best_epoch: The one that was kept.
        evaluation: The results of the validation images.
        train_count: Number of images to train on.
        command: The command that was run.
        gates: A sentence on the channel weights over validation images; None without ECA.
    """
    origin: Any = network.pretrained_cfg
    cfg, model, names = config['pretrained_cfg'], config['architecture'], config['label_names']
    sizes = kernel_sizes_of(network.state_dict())
    name = f'{model}.{"-".join(data_name.split("/"))}'
    listed = ', '.join(names[:20]) + (f' and {len(names) - 20} more (see config.json)' if len(names) > 20 else '')
    return _CARD.substitute(
        metadata=render_metadata(
            name, {f'Top-{k} accuracy': round(evaluation.metrics[f'top{k}'], 2) for k in (1, 5)
                   if f'top{k}' in evaluation.metrics},
            data_name, eca=bool(sizes), license=origin.get('license'), base_model=origin.get('hf_hub_id')),
        name=name,
        model=model,
        data_name=data_name,
        accuracy=evaluation.accuracy,
        val_count=f'{len(evaluation.results):,}',
        usage=render_usage(model, cfg, len(names)) if is_model(model) else '',
        details=render_details(
            model, cfg, deepcopy(network).to('meta'), f'{len(names):,}: {_escape(listed)}'),
        num_classes=f'{len(names):,}',
        start=start,
        train_images=f'{train_count:,} images',
        command=command,
        epochs=epochs,
        best_epoch=best_epoch,
        per_class=_per_class(evaluation),
        gates=f'\n{gates}\n' if gates else '',
        citation=CITATION,
    )


def _per_class(evaluation: Evaluation) -> str:
    scores = evaluation.by_class()
    if len(scores) > 50:
        return ''
    rows = [(_escape(s.name), str(s.images), '-' if s.recall is None else f'{s.recall:.1f}') for s in scores]
    table = [('class', 'images', 'found (%)'), ('---', '---', '---'), *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in table)


def _escape(text: str) -> str:
    """Text that may come from a folder's name, fit for Markdown."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')
