"""Parameters, multiply-adds and activations, beside the figures that the authors report."""
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

from timm_eca import EfficientChannelAttention
from helpers.complexity import count_complexity
from timm_eca.weights.official import OFFICIAL

ROOT = Path(__file__).parents[2]
# The authors' figures, M = 2**20 and G = 2**30: parameters, and what they count as multiply-adds.
REPORTED = {
    'eca_resnet18': ('11.15M', '1.70G'), 'eca_resnet34': ('20.79M', '3.43G'), 'eca_resnet50': ('24.37M', '3.86G'),
    'eca_resnet101': ('42.49M', '7.35G'), 'eca_resnet152': ('57.41M', '10.83G'), 'eca_mobilenetv2': ('3.34M', '319.9M'),
}


def _authors_flops(model: nn.Module) -> int:
    """Counts as `thop` did in the middle of 2019, which gives the authors' figures to the last digit.

    Beside multiply-adds: four operations for each element of a norm, the sums of average pools, the additions of the
    linear layer, and one operation for each element of a ReLU, but of one that a block calls several times, as in the
    authors' ResNets, only for its last call. Their MobileNetV2 ends in a mean, which is not counted.
    """
    total = 0
    activations: dict[str, int] = {}  # by the module that calls them: timm has one where the authors share theirs

    def count(name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Conv1d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * (2 * module.in_features - 1)
        elif isinstance(module, nn.BatchNorm2d):
            total += 4 * output.numel()
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            activations[name.rpartition('.')[0]] = output.numel()
        elif isinstance(module, EfficientChannelAttention) or (name == 'global_pool' and hasattr(model, 'fc')):
            total += x.numel() + x.shape[1]

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, inputs, output, n=name: count(n, m, inputs[0], output))
    model.eval()(torch.empty(1, 3, 224, 224, device='meta'))
    return total + sum(activations.values())


@pytest.mark.parametrize(('name', 'reported'), [
    *((name, REPORTED[name][1]) for name in ('eca_resnet18', 'eca_resnet50', 'eca_mobilenetv2')),
    *(pytest.param(name, REPORTED[name][1], marks=pytest.mark.slow)
      for name in ('eca_resnet34', 'eca_resnet101', 'eca_resnet152')),
    ('resnet50', '3.86G'), ('mobilenetv2_100', '319.4M'),
])
def test_authors_figures_explained(name: str, reported: str):
    """What they count beside multiply-adds explains the difference, to the last digit."""
    unit = 2 ** 30 if reported.endswith('G') else 2 ** 20
    counted = _authors_flops(timm.create_model(name, device='meta')) / unit
    multiply_adds = count_complexity(timm.create_model(name, device='meta')).multiply_adds / unit
    assert f'{counted:.{len(reported.partition(".")[2]) - 1}f}' == reported[:-1]
    assert multiply_adds < 0.9955 * float(reported[:-1])


def test_parameters_as_reported():
    """In units of 2^20, to the last digit that is reported (ECA-Net152 has 57.40, reported as 57.41)."""
    for name, (reported, _) in REPORTED.items():
        params = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
        assert params / 2 ** 20 == pytest.approx(float(reported[:-1]), abs=6e-3)


@pytest.mark.parametrize(('name', 'reported'), [
    ('resnet18', 2.48), ('mobilenetv2_100', 6.68), ('regnety_032', 11.26),
])
def test_activations_as_in_timms_tables(name: str, reported: float):
    network = timm.create_model(name, device='meta')
    assert [round(count_complexity(network).activations / 1e6, 2) for _ in range(2)] == [reported] * 2


def test_readme_table():
    """The README's figures are what is counted."""
    readme = (ROOT / 'README.md').read_text()
    rows = re.findall(r'^\| `(eca_\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$', readme, re.MULTILINE)
    assert [row[0] for row in rows[:6]] == [
        'eca_resnet18', 'eca_resnet34', 'eca_resnet50', 'eca_resnet101', 'eca_resnet152', 'eca_mobilenetv2']
    assert {row[0] for row in rows} == set(timm.list_models(module=['eca_resnet', 'eca_mobilenetv2']))
    for name, sizes, *figures in rows:
        counted = count_complexity(timm.create_model(name, device='meta'))
        assert figures[:2] == [f'{counted.params:,}', f'{counted.multiply_adds:,}']
        base = 'mobilenetv2_100' if name == 'eca_mobilenetv2' else name.removeprefix('eca_')
        plain = count_complexity(timm.create_model(base, device='meta'))
        assert counted.params - plain.params == counted.eca_params
        if name in OFFICIAL:
            official = OFFICIAL[name]
            assert sizes == ', '.join(map(str, official.kernel_sizes))
            assert figures[2] == f'{official.top1:.2f} / {official.top5:.2f}'
