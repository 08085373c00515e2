"""Some cases of the fuzzers and a few kills, the same ones each time."""
from pathlib import Path

import pytest

pytest.importorskip('hypothesis')

from checkpoints import CheckpointCase, check_checkpoint, checkpoint_cases
from folders import FolderCase, check_folder_case, folder_cases
from hypothesis import HealthCheck, given, settings
from kill import kill_convert, kill_finetune, kill_push

pytestmark = pytest.mark.slow
SETTINGS = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(SETTINGS, max_examples=100)
@given(checkpoint_cases())
def test_mutated_checkpoints(case: CheckpointCase):
    check_checkpoint(case)


@settings(SETTINGS, max_examples=40)
@given(folder_cases())
def test_mutated_folders(case: FolderCase):
    check_folder_case(case)


@pytest.mark.parametrize('force', [False, True])
def test_killed_conversions(tmp_path: Path, force: bool):
    assert kill_convert(tmp_path, 2, seed=1, force=force).total() >= 2


def test_killed_pushes(tmp_path: Path):
    assert kill_push(tmp_path, 3, seed=3).total() == 3


def test_killed_training(tmp_path: Path):
    pytest.importorskip('accelerate')
    assert kill_finetune(tmp_path, 1, seed=2).total() >= 1
