"""The model card of converted weights. The cards in `hub_cards/` are what this makes for the published models."""
from collections.abc import Mapping
from functools import cache
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import create_model

from timm_eca.conversion.complexity import Complexity, count_complexity
from timm_eca.weights.official import OFFICIAL, PAPER_NAME, REPOSITORY, TAG, OfficialCheckpoint
from timm_eca.weights.store import HUB_ORG

__all__ = ['CITATION', 'PAPER_URL', 'in_words', 'preprocessing_in_words', 'render_card', 'render_usage']

PAPER_URL = 'https://arxiv.org/abs/1910.03151'
TRAINING = {
    'eca_resnet': 'SGD with momentum 0.9 and weight decay 1e-4, batches of 256, 100 epochs from a learning rate of 0.1 '
                  'that is divided by 10 every 30 epochs',
    'eca_mobilenetv2': 'SGD with weight decay 4e-5, batches of 96, 400 epochs from a learning rate of 0.045 that is '
                       'multiplied by 0.98 each epoch, and a dropout of 0.25 before the classifier',
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

_CARD = Template('''\
---
$metadata
---
# Model card for $name

$summary

The gate of a channel is a sigmoid over a 1-D convolution of the channels' global averages, $eca_params weights in
the whole network. It stands after the last norm of each block, before the shortcut is added.

## Model details

- **Model type:** image classification, feature backbone
- **Architecture:** `$model`
- **Kernel sizes by stage:** $kernel_sizes
- **Parameters:** $params, of which $eca_params are ECA's
- **Multiply-adds:** $multiply_adds (convolutions and linear layers, one image of $size)
- **Classes:** $num_classes
- **Preprocessing:** $preprocessing
- **Paper:** $paper_name, $paper_url
- **Original code$and_weights:** $repository (MIT license)

## How to use

The architecture is in the package `timm_eca`, which registers it with timm when it is imported.$in_folder

$usage
$comparison## Conversion and checks

`convert_weights.py` of `timm_eca` made this folder from $source. It read the file as tensors only,
running no code from it, found the architecture and the kernel sizes from the tensors' shapes, renamed the tensors to
timm's names (and widened any of float16 or bfloat16 to float32, which is exact), wrote them, loaded them again as timm
does, and compared every tensor with the source bit for bit. The metadata of `model.safetensors` has the name and the
sha256 of the source file:

```python
from safetensors import safe_open

with safe_open('model.safetensors', framework='pt') as file:
    print(file.metadata())
```

It has a digest of each tensor, too: `timm-eca verify FOLDER --checkpoint FILE` checks the tensors, the config and
this card against each other and against the authors' file, and names what was changed.

## Training

$training

## Limits

$limits

$citation''')

_CLASSIFIER = Template('''\
### Image classification

```python
import timm
import timm_eca
import torch
from PIL import Image

model = timm.create_model('$name', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.open('image.jpg').convert('$mode')
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
top5 = probabilities.topk(5)
```

''')

_BACKBONE = Template('''\
### Feature maps

```python
import timm
import timm_eca
import torch

model = timm.create_model('$name', pretrained=True, features_only=True).eval()
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

model = timm.create_model('$name', pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    embedding = model(torch.randn($batch))  # (1, $embedding)
```

''')


@cache
def _complexity(model: str, kernel_sizes: tuple[int, ...], num_classes: int, in_chans: int) -> Complexity:
    return count_complexity(
        create_model(model, kernel_sizes=kernel_sizes, num_classes=num_classes, in_chans=in_chans, device='meta'),
        (in_chans, 224, 224))


def render_card(model: str, tag: str | None, config: dict[str, Any]) -> str:
    """The card of converted weights, as Markdown with the Hub's metadata before it.

    Args:
        model: Name of the registered model.
        tag: Tag of the weights; that of the authors' weights adds what they report.
        config: The `config.json` of the weights.
    """
    cfg = config['pretrained_cfg']
    kernel_sizes, num_classes = tuple(config['model_args']['kernel_sizes']), config['num_classes']
    in_chans, height, width = cfg['input_size']
    complexity = _complexity(model, kernel_sizes, num_classes, in_chans)
    official = OFFICIAL[model] if tag == TAG else None
    name = f'{model}.{tag}' if tag else model
    source_name = name if official else 'local-dir:.'
    sizes = ', '.join(map(str, kernel_sizes))
    title = OFFICIAL[model].title if model in OFFICIAL else model
    family = 'eca_mobilenetv2' if model.startswith('eca_mobilenetv2') else 'eca_resnet'

    if official:
        summary = (
            f'{title}, the weights that the authors of ECA-Net trained on ImageNet-1k, for timm. Reported by the '
            f'authors: top-1 {official.top1} %, top-5 {official.top5} %.'
        )
        source = f'the authors\' file `{official.file}`\n({official.url})'
        training = f'By the authors, on ImageNet-1k (paper, section 4.1): {TRAINING[family]}.'
        limits = (
            'The accuracies are the authors\' figures and were not measured again by those who converted the weights. '
            'The network knows the\n1,000 classes of ImageNet-1k and shares its biases; ImageNet\'s own terms apply to '
            'what was trained on it.'
        )
    else:
        summary = f'{title} with weights in the format of the authors of ECA-Net, for timm.'
        source = 'a checkpoint in the format of the authors\' code'
        training = 'Not known to the converter.'
        limits = (
            'These are not the weights that the authors of ECA-Net published. What they were trained on, and how good '
            'they are, is not known to the converter.'
        )

    return _CARD.substitute(
        metadata=_metadata(name, cfg, official),
        name=name,
        model=model,
        summary=summary,
        kernel_sizes=sizes,
        params=f'{complexity.params:,}',
        eca_params=complexity.eca_params,
        multiply_adds=in_words(complexity.multiply_adds),
        size=f'{height}x{width}',
        num_classes=f'{num_classes:,}' if num_classes else 'none (a backbone)',
        preprocessing=preprocessing_in_words(cfg),
        paper_name=PAPER_NAME,
        paper_url=PAPER_URL,
        repository=REPOSITORY,
        and_weights=' and weights' if official else '',
        in_folder='' if official else ' Run these in this folder.',
        usage=render_usage(source_name, model, cfg, num_classes),
        comparison=_comparison() if official else '',
        source=source,
        training=training,
        limits=limits,
        citation=CITATION,
    )


def render_usage(name: str, model: str, cfg: Mapping[str, Any], num_classes: int) -> str:
    """The part of a card that shows how weights are loaded and used.

    Args:
        name: What `timm.create_model` is given.
        model: Name of the registered model.
        cfg: The config of the weights.
        num_classes: Number of classes, 0 for a backbone.
    """
    in_chans, height, width = cfg['input_size']
    variables = dict(name=name, mode='L' if in_chans == 1 else 'RGB', batch=f'1, {in_chans}, {height}, {width}')
    usage = _BACKBONE.substitute(
        variables,
        shapes='\n'.join(f'# torch.Size({list(shape)})' for shape in _feature_shapes(model, in_chans, height, width)),
        embedding=_embedding_size(model),
    )
    if num_classes:
        usage = _CLASSIFIER.substitute(variables) + usage
    return usage.rstrip('\n') + '\n'


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


def in_words(multiply_adds: int) -> str:
    """A number of multiply-adds, in words."""
    return f'{multiply_adds / 1e9:.2f} x 10^9' if multiply_adds >= 1e9 else f'{multiply_adds / 1e6:.1f} x 10^6'


def preprocessing_in_words(cfg: Mapping[str, Any]) -> str:
    """What is done to an image, in words."""
    height = cfg['input_size'][1]
    mean, std = (', '.join(map(str, cfg[key])) for key in ('mean', 'std'))
    resized = f'shorter side to {round(height / cfg["crop_pct"])} ({cfg["interpolation"]}), centre crop {height}'
    if cfg.get('crop_mode', 'center') != 'center':
        resized = f'{cfg["crop_mode"]} to {height} ({cfg["interpolation"]}, timm\'s crop_mode)'
    return f'{resized}, mean ({mean}), std ({std})'


@cache
def _feature_shapes(model: str, in_chans: int, height: int, width: int) -> list[tuple[int, ...]]:
    info = create_model(model, features_only=True, in_chans=in_chans, device='meta').feature_info
    return [(1, c, height // r, width // r) for c, r in zip(info.channels(), info.reduction())]


def _embedding_size(model: str) -> int:
    return create_model(model, num_classes=0, device='meta').head_hidden_size


@cache
def _comparison() -> str:
    rows = []
    for model, official in OFFICIAL.items():
        complexity = _complexity(model, official.kernel_sizes, 1000, 3)
        rows.append(
            f'| [{model}.{TAG}](https://huggingface.co/{HUB_ORG}/{model}.{TAG}) | {official.top1:.2f} '
            f'| {official.top5:.2f} | {complexity.params / 1e6:.2f} | {complexity.multiply_adds / 1e9:.2f} '
            f'| {", ".join(map(str, official.kernel_sizes))} |'
        )
    return '\n'.join([
        '\n## Comparison', '',
        'Accuracies on the ImageNet-1k validation set in percent, as the authors report them; parameters (10^6) and '
        'multiply-adds (10^9)', 'as counted by `timm_eca`.', '',
        '| model | top-1 | top-5 | parameters | multiply-adds | kernel sizes |', '|---|---|---|---|---|---|',
        *rows, '', '',
    ])
