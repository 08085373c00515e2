"""The README: its snippets run, and its figures and commands agree with the code and CI."""
import re
from pathlib import Path

import pytest
import timm
from helpers.families import twins_by_family

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
CI = (ROOT / '.ci' / 'run').read_text()
SNIPPETS = re.findall(r'^```python\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippets_run(snippet: str):
    exec(compile(snippet, 'README.md', 'exec'), {})


def test_families():
    named = {family: int(count) for family, count in re.findall(r'`(\w+)`\s(\d+)', README)}
    assert named == {family: len(twins) for family, twins in twins_by_family().items()}


def test_every_registered_model_is_named():
    assert all(f'`{name}`' in README for name in timm.list_models(module=['eca_resnet', 'eca_mobilenetv2']))


def test_two_lines_do_everything():
    """`.ci/run` pastes the two bash blocks into a shell."""
    assert 'block 1' in CI
    assert 'block 2' in CI
    first, second = re.findall(r'^```bash\n(.*)\n```', README, re.MULTILINE)  # a line each
    assert [line.split(' && ')[:2] for line in (first, second)] == [['python3 -m venv venv', '. venv/bin/activate']] * 2
    assert 'timm-eca finetune digits' in first
    assert second.endswith('python -m pytest -n auto')
