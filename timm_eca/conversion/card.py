"""The model card of converted weights."""
from collections.abc import Mapping
from functools import cache
from string import Template
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from timm.models import create_model, get_arch_pretrained_cfgs

from timm_eca.conversion.complexity import count_complexity
from timm_eca.weights.key_maps import GATE, kernel_sizes_of
from timm_eca.weights.official import (
    OFFICIAL, PAPER_ACCURACIES, PAPER_NAME, PROVENANCES, REPOSITORY, TAG, OfficialCheckpoint,
)
from timm_eca.weights.store import HUB_ORG

__all__ = ['CITATION', 'PAPER_URL', 'render_card', 'render_details', 'render_usage']

PAPER_URL = 'https://arxiv.org/abs/1910.03151'
TRAINING = {
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
### Feature maps

```python
import timm
import timm_eca
import torch

model = timm.create_model('local-dir:.', pretrained=True, features_only=True).eval()
with torch.inference_mode():
    features = model(torch.randn($batch))
for feature in features:
    print(feature.shape)
$shapes
```

### Image embeddings

```python
import timm
import timm_eca
import torch

model = timm.create_model('local-dir:.', pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    embedding = model(torch.randn($batch))  # (1, $embedding)
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


def render_card(model: str, tag: str | None, config: dict[str, Any]) -> str:
    """The card of converted weights, as Markdown with the Hub's metadata before it.

    Args:
        model: Name of the registered model.
        tag: Tag of the weights; that of the authors' weights adds what they report.
        config: The `config.json` of the weights.
    """
    cfg = config['pretrained_cfg']
    model_args, num_classes = config['model_args'], config['num_classes']
    network = create_model(model, num_classes=num_classes, device='meta', **model_args)
    official = OFFICIAL[model] if tag == TAG else None
    name = f'{model}.{tag}' if tag else model
    title = OFFICIAL[model].title if model in OFFICIAL else model
    family = 'eca_mobilenetv2' if model.startswith('eca_mobilenetv2') else 'eca_resnet'

    if official:
        summary = (
            f'{title}, an image classification model with Efficient Channel Attention, trained on ImageNet-1k by its '
            f'authors and converted for timm.\nThey report a top-1 accuracy of {official.top1:.2f} % and a top-5 '
            f'accuracy of {official.top5:.2f} % in their repository'
        )
        if model in PAPER_ACCURACIES:
            summary += ', and {:.2f} % and {:.2f} % in the paper'.format(*PAPER_ACCURACIES[model])
        summary += '.'
        source = (
            f'the authors\' file [`{official.file}`]({official.url}). It is taken for theirs because '
            f'{PROVENANCES[config.get("provenance")]}')
        training = f'By the authors, on ImageNet-1k (paper, section 4.1): {TRAINING[family]}.'
        limits = (
            'The accuracies are the authors\' figures. They were not measured again when the weights were converted. '
            'The model\nknows the 1,000 classes of ImageNet-1k and shares the biases of that dataset; its terms apply.'
        )
    else:
        summary = f'{title} with weights in the format of the authors\' code, for timm.'
        source = 'a checkpoint in the format of the authors\' code'
        training = 'Unknown.'
        limits = (
            'These are not known to be weights that the authors of ECA-Net published. Their training data, accuracy '
            'and license\nare unknown.'
        )

    return _CARD.substitute(
        metadata=_metadata(name, cfg, official),
        name=name,
        summary=summary,
        usage=render_usage(model, cfg, num_classes, _fine_tuning(model)),
        details=render_details(model, cfg, network, f'{num_classes:,}' if num_classes else 'none (a backbone)'),
        repository=REPOSITORY,
        and_weights=' and weights' if official else '',
        comparison=_comparison() if official else '',
        source=source,
        training=training,
        limits=limits,
        citation=CITATION,
    )


def render_details(model: str, cfg: Mapping[str, Any], network: nn.Module, classes: str) -> str:
    """The list of a card that says what a model is.

    Args:
        model: Name of the architecture.
        cfg: The config of the weights.
        network: The model, on the meta device.
        classes: The classes, in words.
    """
    complexity = count_complexity(network, tuple(cfg['input_size']))
    kernels = {key: value for key, value in network.state_dict().items() if key.endswith(GATE)}
    sizes = ', '.join(map(str, kernel_sizes_of(kernels))) or 'none, this model has no ECA'
    if kernels and all(len(kernel) > 1 for kernel in kernels.values()):
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
        f'- **Paper:** {PAPER_NAME}, {PAPER_URL}',
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
    return _USAGE.substitute(
        fine_tuning=fine_tuning,
        classification=classification,
        batch=f'1, {in_chans}, {height}, {width}',
        shapes='\n'.join(f'# torch.Size({shape})' for shape in shapes),
        embedding=create_model(model, num_classes=0, device='meta').head_hidden_size,
    )


def _fine_tuning(model: str) -> str:
    """Leads those who want to fine-tune to weights that timm can download, a warm start."""
    warm = next((cfg for cfg in get_arch_pretrained_cfgs(model).values() if cfg.tag != TAG and cfg.has_weights), None)
    return '' if warm is None else (
        '\nTo train on images of your own, start from timm\'s ImageNet weights with ECA added (a warm start: at first\n'
        'the model computes what it does without ECA): '
        f'`timm-eca finetune IMAGE_FOLDER --model {model}.{warm.tag}`.\n')


def _metadata(name: str, cfg: dict[str, Any], official: OfficialCheckpoint | None) -> str:
    results = [
        EvalResult(
            task_type='image-classification', dataset_type='imagenet-1k', dataset_name='ImageNet-1k',
            dataset_split='validation', metric_type='accuracy', metric_value=value,
            metric_name=f'{metric} accuracy (reported by the authors)', source_name='BangguWu/ECANet',
            source_url=REPOSITORY,
        )
        for metric, value in (('Top-1', official.top1), ('Top-5', official.top5))
    ] if official else None
    return ModelCardData(
        license=cfg.get('license'),
        library_name='timm',
        pipeline_tag='image-classification' if cfg['num_classes'] else 'image-feature-extraction',
        tags=['timm', 'eca', 'channel-attention', *(['image-classification'] if cfg['num_classes'] else [])],
        datasets=['imagenet-1k'] if official else None,
        model_name=name if official else None,
        eval_results=results,
    ).to_yaml()


@cache
def _comparison() -> str:
    rows = []
    for model, official in OFFICIAL.items():
        complexity = count_complexity(create_model(model, kernel_sizes=official.kernel_sizes, device='meta'))
        rows.append(
            f'| [{model}.{TAG}](https://huggingface.co/{HUB_ORG}/{model}.{TAG}) | {official.top1:.2f} '
            f'| {official.top5:.2f} | {complexity.params / 1e6:.1f} | {complexity.multiply_adds / 1e9:.2f} '
            f'| {complexity.activations / 1e6:.1f} | {", ".join(map(str, official.kernel_sizes))} |'
        )
    return '\n'.join([
        '## Comparison', '',
        'Accuracies on the ImageNet-1k validation set in percent, as the authors report them; the rest is counted by '
        '`timm_eca`.', '',
        '| model | top-1 | top-5 | params (M) | GMACs | activations (M) | kernel sizes |',
        '|---|---|---|---|---|---|---|', *rows, '', '',
    ])
