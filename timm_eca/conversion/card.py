"""The model card of converted weights."""
from collections.abc import Mapping
from functools import cache
from string import Template
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import tqdm
from timm.models import create_model, get_arch_pretrained_cfgs

from timm_eca.conversion.complexity import count_complexity
from timm_eca.layers.attention import EcaNs
from timm_eca.weights.key_maps import kernel_sizes_of
from timm_eca.weights.official import OFFICIAL, PAPER_ACCURACIES, PAPER_NAME, PROVENANCES, REPOSITORY, TAG
from timm_eca.weights.store import HUB_ORG

__all__ = ['CITATION', 'render_card', 'render_details', 'render_metadata', 'render_usage']

_SOURCE = {'source_name': 'BangguWu/ECANet', 'source_url': REPOSITORY}  # of the accuracies
_TRAINING = {
    'eca_resnet': 'SGD with momentum 0.9 and weight decay 1e-4, batches of 256 images, 100 epochs, and a learning rate '
                  'of 0.1 that was divided by 10 every 30 epochs',
    'eca_mobilenetv2': 'SGD with weight decay 4e-5, batches of 96 images, 400 epochs, a learning rate of 0.045 that '
                       'was multiplied by 0.98 each epoch, and dropout of 0.25 before the classifier',
}

CITATION = '''\
## Citation

```bibtex
@inproceedings{wang2020eca,
  title={ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks},
  author={Wang, Qilong and Wu, Banggu and Zhu, Pengfei and Li, Peihua and Zuo, Wangmeng and Hu, Qinghua},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2020}
}
```
'''

# `local-dir:.` names the weights: this folder, or the repository once they are pushed (`point_to_repository`).
_CARD = Template('''\
---
$metadata
---
# Model card for $name

$summary

$usage
## Model details

$details
- **Original code$and_weights:** $repository (MIT license)

Efficient Channel Attention (ECA) averages each channel over the image, computes one weight between 0 and 1 for each
channel from these averages (a 1-D convolution over neighbouring channels, then a sigmoid), and multiplies the channel
by it. It follows the last norm of each block, before the shortcut is added.

$comparison## Training

$training

## Where the weights are from

The source is $source.

`timm_eca` read it without running code from it, took the architecture and the kernel sizes from the shapes of the
tensors, gave the tensors timm's names, and compared what timm loads with the source, bit for bit. `model.safetensors`
records the SHA-256 of the source and of each tensor: `timm-eca verify local-dir:. --checkpoint FILE` compares them.

## Limits

$limits

$citation''')

_USAGE = Template('''\
```sh
pip install timm_eca
```

```python
import timm
import timm_eca  # registers the architecture with timm

model = timm.create_model('local-dir:.', pretrained=True)
```
$fine_tuning
## Usage

`local-dir:.` names these weights.
$classification
### Feature maps and embeddings

```python
import timm
import timm_eca
import torch

images = torch.randn($batch)
backbone = timm.create_model('local-dir:.', pretrained=True, features_only=True).eval()
embedder = timm.create_model('local-dir:.', pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    for feature in backbone(images):
        print(feature.shape)
    print(embedder(images).shape)
$shapes
```
''')

_CLASSIFICATION = Template('''
### Image classification

```python
from urllib.request import urlopen

import timm
import timm_eca
import torch
from PIL import Image

url = 'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
image = Image.open(urlopen(url)).convert('$mode')

model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
top$k = probabilities.topk($k)
```
''')

_COMPARISON = Template('''\
## Comparison

Accuracies on the ImageNet-1k validation set in percent, as the authors report them; the rest is counted by `timm_eca`.

| model | top-1 | top-5 | params (M) | GMACs | activations (M) | kernel sizes |
|---|---|---|---|---|---|---|
$rows
''')


def render_card(model: str, tag: str | None, config: dict[str, Any], provenance: str | None) -> str:
    """The card of converted weights, as Markdown with the Hub's metadata before it.

    Args:
        model: Name of the registered model.
        tag: Tag of the weights; that of the authors' weights adds what they report.
        config: The `config.json` of the weights.
        provenance: Why the weights are taken for the authors', a key of `PROVENANCES`.
    """
    cfg, num_classes = config['pretrained_cfg'], config['num_classes']
    network = create_model(model, num_classes=num_classes, device='meta', **config['model_args'])
    official = OFFICIAL[model] if tag == TAG else None
    title = OFFICIAL[model].title if model in OFFICIAL else model
    family = 'eca_mobilenetv2' if model.startswith('eca_mobilenetv2') else 'eca_resnet'
    name = f'{model}.{tag}' if tag else model
    results: dict[str, float] = {}
    summary = f'{title} with weights in the format of the authors\' code, for timm.'
    source = 'a checkpoint in the format of the authors\' code'
    training = 'Unknown.'
    limits = (
        'These are not known to be weights that the authors of ECA-Net published. Their training data, accuracy and '
        'license\nare unknown.')
    if official:
        results = {'Top-1 accuracy (reported by the authors)': official.top1,
                   'Top-5 accuracy (reported by the authors)': official.top5}
        in_paper = PAPER_ACCURACIES.get(model)
        summary = (
            f'{title}, an image classification model with Efficient Channel Attention, trained on ImageNet-1k by its '
            f'authors and converted for timm.\nThey report a top-1 accuracy of {official.top1:.2f} % and a top-5 '
            f'accuracy of {official.top5:.2f} % in their repository'
            + (f', and {in_paper[0]:.2f} % and {in_paper[1]:.2f} % in the paper.' if in_paper else '.'))
        source = (
            f'the authors\' file [`{official.file}`]({official.url}). It is taken for theirs because '
            f'{PROVENANCES[provenance or ""]}')
        training = f'By the authors, on ImageNet-1k (paper, section 4.1): {_TRAINING[family]}.'
        limits = (
            'The accuracies are the authors\' figures. They were not measured again when the weights were converted. '
            'The model\nknows the 1,000 classes of ImageNet-1k and shares the biases of that dataset; its terms apply.')
    # Leads those who want to fine-tune to weights that timm can download, a warm start.
    warm = next((cfg for cfg in get_arch_pretrained_cfgs(model).values() if cfg.tag != TAG and cfg.has_weights), None)
    fine_tuning = '' if warm is None else (
        '\nTo train on images of your own, start from timm\'s ImageNet weights with ECA added (a warm start: at first\n'
        'the model computes what it does without ECA): '
        f'`timm-eca finetune IMAGE_FOLDER --model {model}.{warm.tag}`.\n')
    return _CARD.substitute(
        metadata=render_metadata(
            name, results, 'imagenet-1k', bool(num_classes), license=cfg.get('license'),
            datasets=['imagenet-1k'] if official else None, source=_SOURCE),
        name=name,
        summary=summary,
        usage=render_usage(model, cfg, num_classes, fine_tuning),
        details=render_details(model, cfg, network, f'{num_classes:,}' if num_classes else 'none (a backbone)'),
        repository=REPOSITORY,
        and_weights=' and weights' if official else '',
        comparison=_comparison() if official else '',
        source=source,
        training=training,
        limits=limits,
        citation=CITATION,
    )


def render_metadata(
        name: str,
        results: Mapping[str, float],
        dataset: str,
        classifies: bool = True,
        eca: bool = True,
        source: dict[str, Any] | None = None,
        **data: Any,
) -> str:
    """The Hub's metadata of a card, as YAML.

    Args:
        name: Name of the weights.
        results: Accuracies on the validation images of `dataset`, by the names of their metrics.
        source: `source_name` and `source_url` of the results, if they are others'.
        **data: What else `ModelCardData` takes.
    """
    task = 'image-classification'
    evaluated = [
        EvalResult(
            task_type=task, dataset_type=dataset, dataset_name=dataset, dataset_split='validation',
            metric_type='accuracy', metric_name=metric, metric_value=value, **(source or {}))
        for metric, value in results.items()]
    return ModelCardData(
        library_name='timm',
        pipeline_tag=task if classifies else 'image-feature-extraction',
        tags=['timm', *(['eca', 'channel-attention'] if eca else []), *([task] if classifies else [])],
        model_name=name if results else None,
        eval_results=evaluated or None,
        **data,
    ).to_yaml()


def render_details(model: str, cfg: Mapping[str, Any], network: nn.Module, classes: str) -> str:
    """The list of a card that says what a model is.

    Args:
        model: Name of the architecture.
        cfg: The config of the weights.
        network: The model, on the meta device.
        classes: The classes, in words.
    """
    complexity = count_complexity(network, tuple(cfg['input_size']))
    sizes = ', '.join(map(str, kernel_sizes_of(network.state_dict()))) or 'none, this model has no ECA'
    if any(isinstance(layer, EcaNs) for layer in network.modules()):
        sizes += ' (ECA-NS: a kernel for each channel)'
    height, width = cfg['input_size'][1:]
    mean, std = (', '.join(map(str, cfg[key])) for key in ('mean', 'std'))
    resized = f'shorter side to {round(height / cfg["crop_pct"])} ({cfg["interpolation"]}), centre crop {height}'
    if cfg.get('crop_mode', 'center') != 'center':
        resized = f'{cfg["crop_mode"]} to {height} ({cfg["interpolation"]}, timm\'s crop_mode)'
    return '\n'.join((
        '- **Model type:** image classification, feature backbone',
        f'- **Architecture:** `{model}`',
        f'- **Kernel sizes of ECA by stage:** {sizes}',
        f'- **Params (M):** {complexity.params / 1e6:.1f} ({complexity.params:,}, of which {complexity.eca_params:,} '
        'are of ECA)',
        f'- **GMACs:** {complexity.multiply_adds / 1e9:.2f}',
        f'- **Activations (M):** {complexity.activations / 1e6:.1f}',
        f'- **Image size:** {height} x {width}',
        f'- **Preprocessing:** {resized}, mean ({mean}), std ({std})',
        f'- **Classes:** {classes}',
        f'- **Paper:** {PAPER_NAME}, https://arxiv.org/abs/1910.03151',
    ))


def render_usage(model: str, cfg: Mapping[str, Any], num_classes: int, fine_tuning: str = '') -> str:
    """The part of a card that shows how weights are installed, loaded and used.

    Args:
        model: Name of the registered model.
        cfg: The config of the weights.
        num_classes: Number of classes, 0 for a backbone.
        fine_tuning: A paragraph on fine-tuning.
    """
    in_chans, height, width = cfg['input_size']
    classification = ''
    if num_classes and in_chans in (1, 3):
        classification = _CLASSIFICATION.substitute(mode='L' if in_chans == 1 else 'RGB', k=min(num_classes, 5))
    features = create_model(model, features_only=True, device='meta').feature_info
    shapes = [[1, c, height // r, width // r] for c, r in zip(features.channels(), features.reduction())]
    shapes.append([1, create_model(model, num_classes=0, device='meta').head_hidden_size])
    return _USAGE.substitute(
        fine_tuning=fine_tuning,
        classification=classification,
        batch=f'1, {in_chans}, {height}, {width}',
        shapes='\n'.join(f'# torch.Size({shape})' for shape in shapes),
    )


@cache
def _comparison() -> str:
    """The section of a card that compares the authors' models."""
    rows = []
    for model, official in tqdm(OFFICIAL.items(), 'counting for the card', leave=False, disable=None):
        counted = count_complexity(create_model(model, device='meta'))
        rows.append(
            f'| [{model}.{TAG}](https://huggingface.co/{HUB_ORG}/{model}.{TAG}) | {official.top1:.2f} '
            f'| {official.top5:.2f} | {counted.params / 1e6:.1f} | {counted.multiply_adds / 1e9:.2f} '
            f'| {counted.activations / 1e6:.1f} | {", ".join(map(str, official.kernel_sizes))} |\n')
    return _COMPARISON.substitute(rows=''.join(rows))
