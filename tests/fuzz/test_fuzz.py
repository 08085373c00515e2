"""500 cases of the fuzzer and a few kills, the same ones each time."""
from pathlib import Path

import pytest

pytest.importorskip('hypothesis')

from hypothesis import HealthCheck, given, settings

from fuzz import Case, cases, check, check_memory
from kill import kill_convert, kill_finetune


@settings(max_examples=500, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_mutated_checkpoints(case: Case):
    check(case)
    check_memory()


@pytest.mark.parametrize('force', [False, True])
def test_killed_conversions(tmp_path: Path, force: bool):
    assert kill_convert(tmp_path, 3, seed=1, force=force).total() == 3


def test_killed_training(tmp_path: Path):
    pytest.importorskip('accelerate')
    assert kill_finetune(tmp_path, 2, seed=2).total() == 2
