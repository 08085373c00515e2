"""The packages that use timm's models, on ours: transformers, segmentation_models_pytorch, torchvision's detectors."""
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d
from timm.models import create_model, save_for_hf
from torchvision.models import detection
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from timm_eca.layers.norm_attn import named_norm_attn


class Pyramid(nn.Module):
    """The backbone of torchvision's detectors on any model here: feature maps of 256 channels.

    Give `pretrained=True` for pretrained weights. Norms are frozen, as in torchvision's backbones.
    """

    def __init__(self, name: str, extra_blocks: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.body = freeze_batch_norm_2d(create_model(name, features_only=True, **kwargs))
        self.out_channels = 256
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, extra_blocks or LastLevelMaxPool())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): f for i, f in enumerate(self.body(x))})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = create_model('eca_resnet18', num_classes=3)
    for _, place in named_norm_attn(model):
        nn.init.normal_(place.attn.conv.weight)
        nn.init.ones_(place.norm.weight)
    save_for_hf(model, tmp_path / 'folder')
    return tmp_path / 'folder'


@pytest.mark.parametrize('folder_first', [True, False])
def test_transformers_backbones(folder: Path, folder_first: bool):
    transformers = pytest.importorskip('transformers')
    name = f'local-dir:{folder}'
    if folder_first:
        config = transformers.TimmBackboneConfig(backbone=name, out_indices=(1, 2, 3, 4))
        backbone = transformers.AutoBackbone.from_config(config, pretrained=True)
    else:
        backbone = transformers.TimmBackbone.from_pretrained(name, out_indices=(1, 2, 3, 4))
    features = create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for found, wanted in zip(backbone.eval()(x).feature_maps, features(x)):
            assert torch.equal(found, wanted)
    assert backbone.channels == [64, 128, 256, 512]


def assert_attention_learns(model: nn.Module) -> None:
    gradients = [p.grad for name, p in model.named_parameters() if '.attn.' in name]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def masks(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright square, and where it is."""
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(n, 3, 64, 64, generator=generator), torch.zeros(n, 64, 64, dtype=torch.long)
    for i in range(n):
        top, left = torch.randint(0, 32, (2,), generator=generator).tolist()
        mask[i, top:top + 32, left:left + 32] = 1
    return x + 3 * mask[:, None], mask


def test_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    model = smp.Unet('tu-eca_mobilenetv2_050', encoder_weights=None, classes=2).train()
    x, mask = masks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    assert_attention_learns(model)


FEW_BOXES = {'rpn_post_nms_top_n_train': 100, 'rpn_post_nms_top_n_test': 50, 'box_batch_size_per_image': 32}
DETECTORS = {
    'FasterRCNN': ('fasterrcnn_resnet50_fpn', (1, 2, 3, 4), None, FEW_BOXES),
    'MaskRCNN': ('maskrcnn_resnet50_fpn', (1, 2, 3, 4), None, FEW_BOXES),
    'RetinaNet': ('retinanet_resnet50_fpn', (2, 3, 4), lambda: LastLevelP6P7(256, 256), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', DETECTORS)
def test_detectors(kind: str):
    """Parameters are torchvision's and ECA's; it trains and detects."""
    builder, out_indices, extra, options = DETECTORS[kind]
    make = getattr(detection, kind)
    with torch.device('meta'):
        pyramid = Pyramid('eca_resnet50', extra_blocks=extra and extra(), out_indices=out_indices)
        # Its norms are frozen only where it has weights for its backbone.
        plain = freeze_batch_norm_2d(getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=91))
        assert count(make(pyramid, num_classes=91)) == count(plain) + 80

    torch.manual_seed(0)
    small = Pyramid('eca_resnet18', extra_blocks=extra and extra(), out_indices=out_indices)
    model = make(small, num_classes=2, min_size=64, max_size=64, **options).train()
    x, mask = masks(2)
    targets = []
    for m in mask:
        rows, columns = m.nonzero(as_tuple=True)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        targets.append({'boxes': box[None], 'labels': torch.ones(1, dtype=torch.long), 'masks': m[None].byte()})
    loss = sum(model(list(x), targets).values())
    assert loss.isfinite()
    loss.backward()
    assert_attention_learns(model)
    with torch.no_grad():
        assert {'boxes', 'labels', 'scores'} <= model.eval()(list(x))[0].keys()
