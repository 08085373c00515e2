"""Model cards. Those of the authors' weights are files in `hub_cards/`, all others come from `template.md` there.

The examples in a card load the weights from `local-dir:.`, the folder of the card. `push` writes the repository there.
"""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData

from timm_eca.layers.attention import EcaNs
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.weights.key_maps import describe_kernel_sizes, to_timm
from timm_eca.weights.official import PAPER_ID, PAPER_NAME, PROVENANCES, REPOSITORY

__all__ = ['converted_card', 'finetuned_card', 'official_card', 'render_card']

_PLUGIN = 'import timm_eca  # registers the architecture with timm\n'
_INSTALL = '''\
```sh
# Once timm_eca is released. Until then: pip install . in a checkout of it.
pip install timm_eca
```

'''


def _read(name: str) -> str:
    """A file of `hub_cards/`: in the package after an installation, beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = next(filter(Path.is_dir, (package / 'hub_cards', package.parent / 'hub_cards')))
    return (folder / name).read_text(encoding='utf-8')


def official_card(name: str, provenance: str, needs_plugin: bool = True) -> str:
    """The card of the authors' weights.

    The files of the models that timm has a form of (`timm_eca.as_timm_model`) are written for that form. In the form of
    this package, their examples import `timm_eca` as well.

    Args:
        name: `<model>.<tag>`.
        provenance: Why the converted file counts as the authors', a key of `PROVENANCES`.
        needs_plugin: The weights are in the form of this package.
    """
    card = _read(f'{name}.md').replace(PROVENANCES['downloaded'], PROVENANCES[provenance])
    if needs_plugin and _PLUGIN not in card:
        card = re.sub(r'## Two ways to load it\n.*?(?=^## )', '', card, flags=re.DOTALL | re.MULTILINE)
        card = card.replace('```python\n', f'{_INSTALL}```python\n', 1)
        card = re.sub(r'^import timm$', f'import timm\n{_PLUGIN.rstrip()}', card, flags=re.MULTILINE)
    return re.sub(rf'hf-hub:[\w-]+/{re.escape(name)}', 'local-dir:.', card)


def converted_card(name: str, config: Mapping[str, Any], network: nn.Module) -> str:
    """The card of weights in the authors' format that are not known to be theirs."""
    classes = config['num_classes']
    return render_card(
        name, config, network,
        summary='These weights are not known to be those of ECA-Net\'s authors. They were converted for timm from a\n'
                'checkpoint in the format of the authors\' code.',
        classes=f'{classes:,}' if classes else 'none (a backbone)',
        sections={
            'Where the weights are from': (
                f'The format is that of {REPOSITORY}. `timm_eca` took the architecture and the kernel sizes from the '
                'shapes\nof the tensors, and compared what timm loads with the checkpoint, bit for bit. '
                '`model.safetensors` records the\nSHA-256 of the checkpoint and of each tensor: `timm-eca verify '
                'local-dir:. --checkpoint FILE` compares them.'),
            'Limits': 'Nothing is known of the training data, the accuracy and the license.',
        })


def finetuned_card(
        network: nn.Module,
        config: Mapping[str, Any],
        start: str,
        data_name: str,
        epochs: int,
        best_epoch: int,
        metrics: Mapping[str, float],
        train_count: int,
        val_count: int,
        class_scores: Sequence[tuple[str, int, float | None]],
        command: str,
        gates: str | None = None,
        worst_pairs: Sequence[tuple[str, str, int]] | None = None,
        **metadata: Any,
) -> str:
    """The card of fine-tuned weights.

    Args:
        network: The model.
        config: The `config.json`, with `label_names`.
        start: The weights that the training started from, in words.
        metrics: `top1` and, for more than five classes, `top5`: percent of the validation images.
        class_scores: Name, number of validation images and recall in percent (None without images) of each class.
        gates: A sentence on the channel weights over validation images.
        worst_pairs: A class, a wrong prediction and the number of images. None: there is a figure instead.
        **metadata: `license` and `base_model` of the weights that the training started from.
    """
    model, names = config['architecture'], config['label_names']
    shown = {k: metrics[f'top{k}'] for k in (1, 5) if f'top{k}' in metrics}
    accuracy = ', '.join(f'top-{k} {value:.2f} %' for k, value in shown.items())
    results = [
        f'On the {val_count:,} validation images: {accuracy}. The epoch was chosen with these images: expect lower '
        'accuracy on others.']
    if len(class_scores) <= 50:
        results.append(_table('class', 'images', 'recall (%)', rows=[
            (_escape(name), images, '-' if recall is None else f'{recall:.1f}') for name, images, recall in class_scores
        ]))
    if worst_pairs is None:
        results.append('![Confusion matrix](confusion_matrix.png)')
    elif worst_pairs:
        pairs = [(_escape(name), _escape(predicted), images) for name, predicted, images in worst_pairs]
        results.append('The most frequent confusions:\n\n' + _table('class', 'predicted', 'images', rows=pairs))
    more = f' and {len(names) - 20} more (see config.json)' if len(names) > 20 else ''
    return render_card(
        f'{model}.{"-".join(data_name.split("/"))}', config, network,
        summary=f'`{model}`, fine-tuned on {data_name}: {accuracy} on {val_count:,} validation images.',
        classes=f'{len(names):,}: {_escape(", ".join(names[:20]) + more)}',
        sections={
            'Training': (
                f'From {start}, on {train_count:,} images of {data_name}, in {epochs} epochs. The weights are those of '
                f'epoch {best_epoch},\nwhich had the highest validation accuracy. `metrics.csv` has the losses and '
                f'accuracies of all epochs.\nThe command:\n\n```\n{command}\n```\n\n'
                '![Losses and accuracies over the epochs](curves.png)'),
            'Results': '\n\n'.join([*results, *([gates] if gates else [])]),
            'Limits': (
                f'The network knows these {len(names):,} classes only, and gives one of them for any image. It was '
                'tested on the\nvalidation images only. The terms of the images and of the weights before the training '
                'apply.'),
        },
        results={f'Top-{k} accuracy': round(value, 2) for k, value in shown.items()},
        dataset=data_name,
        **metadata,
    )


def render_card(
        name: str,
        config: Mapping[str, Any],
        network: Any,
        summary: str,
        classes: str,
        sections: Mapping[str, str],
        results: Mapping[str, float] | None = None,
        dataset: str = '',
        data: ModelCardData | None = None,
        **metadata: Any,
) -> str:
    """A card from the template, as Markdown with the Hub's metadata before it.

    The examples import `timm_eca` only if the network needs it.

    Args:
        name: Name of the weights.
        config: The `config.json`.
        network: The model.
        summary: The first paragraph.
        classes: The classes, in words.
        sections: Paragraphs by their titles, after the model's details.
        results: Accuracies on the validation images of `dataset`, by the names of their metrics.
        data: The metadata, if it is not to be made from the other arguments.
        **metadata: Other arguments of `huggingface_hub.ModelCardData`.
    """
    cfg = config['pretrained_cfg']
    plugin = any(True for _ in named_norm_attn(network))
    kernel_sizes = describe_kernel_sizes(to_timm(network.state_dict()))
    if any(isinstance(layer, EcaNs) for layer in network.modules()):
        kernel_sizes += ' (ECA-NS: a kernel for each channel)'
    if data is None:
        task = 'image-classification' if network.num_classes else 'image-feature-extraction'
        evaluated = [
            EvalResult(
                task_type=task, dataset_type=dataset, dataset_name=dataset, dataset_split='validation',
                metric_type='accuracy', metric_name=metric, metric_value=value)
            for metric, value in (results or {}).items()]
        data = ModelCardData(
            library_name='timm', pipeline_tag=task,
            tags=['timm', *(['eca', 'channel-attention'] if kernel_sizes else []), task],
            model_name=name if evaluated else None, eval_results=evaluated or None, **metadata)
    params = sum(p.numel() for p in network.parameters())
    height, width = cfg['input_size'][1:]
    mean, std = (', '.join(map(str, cfg[key])) for key in ('mean', 'std'))
    return Template(_read('template.md')).substitute(
        metadata=data.to_yaml(),
        name=name,
        summary=summary,
        install=_INSTALL if plugin else '',
        plugin=_PLUGIN if plugin else '',
        size=', '.join(map(str, cfg['input_size'])),
        architecture=config['architecture'],
        kernels=kernel_sizes and (
            f'- **Kernel sizes of ECA by stage:** {kernel_sizes}\n'
            f'- **Paper:** {PAPER_NAME}, https://arxiv.org/abs/{PAPER_ID.removeprefix("arXiv:")}\n'),
        params=f'{params / 1e6:.1f} ({params:,})',
        preprocessing=(
            f'resize to {round(height / cfg["crop_pct"])} ({cfg["interpolation"]}), crop {height} x {width} (timm\'s '
            f'crop mode {cfg.get("crop_mode") or "center"}), mean ({mean}), std ({std})'),
        classes=classes,
        sections='\n\n'.join(f'## {title}\n\n{text}' for title, text in sections.items()),
    )


def _table(*titles: str, rows: Sequence[Sequence[object]]) -> str:
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in (titles, ['---'] * len(titles), *rows))


def _escape(text: str) -> str:
    """Makes a text that may be the name of a folder fit for Markdown."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')
