"""A small model folder."""
import shutil
from pathlib import Path

import pytest
import torch
from timm.models import create_model, save_for_hf


@pytest.fixture(scope='session')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('saved') / 'folder'
    save_for_hf(create_model('eca_test_resnet', num_classes=3, kernel_sizes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_text("---\nlicense: mit\n---\ntimm.create_model('local-dir:.')\n")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(saved, tmp_path / 'folder'))
