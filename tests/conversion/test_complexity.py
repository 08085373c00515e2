"""The README's table: parameters and multiply-adds, beside the figures that the authors report."""
import re
from pathlib import Path

import pytest
import timm
from helpers.complexity import count_complexity

from timm_eca.weights.names import base_name
from timm_eca.weights.official import OFFICIAL

ROOT = Path(__file__).parents[2]
# The authors' numbers of parameters, M = 2**20.
REPORTED = {
    'eca_resnet18': 11.15, 'eca_resnet34': 20.79, 'eca_resnet50': 24.37, 'eca_resnet101': 42.49,
    'eca_resnet152': 57.41, 'eca_mobilenetv2': 3.34}


def test_activations_as_in_timms_tables():
    network = timm.create_model('resnet18', device='meta')
    assert [round(count_complexity(network).activations / 1e6, 2) for _ in range(2)] == [2.48] * 2


ROWS = re.findall(r'^\| `(eca_\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$', (ROOT / 'README.md').read_text(), re.M)


def test_readme_names_all_models():
    assert [row[0] for row in ROWS[:6]] == list(REPORTED)
    assert {row[0] for row in ROWS} == set(timm.list_models(module=['eca_resnet', 'eca_mobilenetv2']))


@pytest.mark.parametrize('row', [
    pytest.param(row, id=row[0], marks=[] if row[0] in ('eca_resnet18', 'eca_mobilenetv2') else pytest.mark.slow)
    for row in ROWS])
def test_readme_table(row: tuple[str, ...]):
    name, sizes, *figures = row
    counted = count_complexity(timm.create_model(name, device='meta'))
    assert figures[:2] == [f'{counted.params:,}', f'{counted.multiply_adds:,}']
    plain = timm.create_model(base_name(name), device='meta')
    assert counted.params - sum(p.numel() for p in plain.parameters()) == counted.eca_params
    if name in OFFICIAL:
        official = OFFICIAL[name]
        assert counted.params / 2 ** 20 == pytest.approx(REPORTED[name], abs=6e-3)  # ECA-Net152 has 57.40
        assert sizes == ', '.join(map(str, official.kernel_sizes))
        assert figures[2] == f'{official.top1:.2f} / {official.top5:.2f}'
