"""The README: its snippets run, its figures are those of the code, its commands those of CI."""
import re
from pathlib import Path

import pytest
import timm
from helpers.families import twins_by_family

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
SNIPPETS = re.findall(r'^```python\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippets_run(snippet: str):
    exec(compile(snippet, 'README.md', 'exec'), {})


def test_families():
    named = {family: int(count) for family, count in re.findall(r'`(\w+)`\s(\d+)', README)}
    assert named == {family: len(twins) for family, twins in twins_by_family().items()}


def test_every_registered_model_is_named():
    assert all(f'`{name}`' in README for name in timm.list_models(module=['eca_resnet', 'eca_mobilenetv2']))


def test_ci_runs_its_commands():
    ci = (ROOT / '.ci' / 'run').read_text()
    for command in ("pip install -e '.[test]'", 'python -m pytest -n auto'):
        assert command in README
        assert command in ci
