"""The README: its snippets run, its figures are those of the code, its commands those of CI."""
import re
from collections import Counter
from pathlib import Path

import pytest
import timm

from timm_eca.models.eca_twins import _TWINS

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
SNIPPETS = re.findall(r'^```python\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippets_run(snippet: str):
    exec(compile(snippet, 'README.md', 'exec'), {})


def test_families():
    counts = Counter(family for _, family in _TWINS.values())
    counts.update(resnet=7, efficientnet=3)  # the models that have modules of their own
    table = dict(re.findall(r'^\| `(\w+)` \| (\d+) \| [^|]*\|$', README, re.MULTILINE))
    assert {family: int(count) for family, count in table.items()} == counts


def test_every_registered_model_is_named():
    assert all(f'`{name}`' in README for name in timm.list_models(module=['eca_resnet', 'eca_mobilenetv2']))


def test_ci_runs_its_commands():
    ci = (ROOT / '.ci' / 'run').read_text()
    for command in ("pip install -e '.[test]'", 'python -m pytest -n auto'):
        assert command in README
        assert command in ci
