"""Fixtures: isolated homes for weights and caches, a Hub of the tests' own, and the shared data where it is at hand."""
import os
from collections.abc import Iterator
from pathlib import Path

# Before huggingface_hub is imported: it reads them once. No test reaches beyond this machine.
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
os.environ['TIMM_ECA_DOWNLOAD'] = '0'
for _name in ('TIMM_ECA_HOME', 'TIMM_ECA_HUB_ORG', 'HF_TOKEN', 'HF_ENDPOINT'):
    os.environ.pop(_name, None)

import pytest
import torch
from helpers.hub_double import HubDouble, point_client_to
from helpers.official_files import official_state_dict, save_official
from huggingface_hub import constants

from timm_eca.commands.process import keep_freed_memory

SHARED = Path(__file__).parents[2] / 'shared'
# Starts autograd's engine now: once it has started threads, no forked process can train.
torch.ones(1, requires_grad=True).backward()
keep_freed_memory()  # forward passes take a third of the time
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))))


@pytest.fixture(scope='session')
def shared() -> Path:
    """The shared data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f'{SHARED} is not there')
    return SHARED


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights directory of the test's own."""
    home = tmp_path / 'home'
    monkeypatch.setenv('TIMM_ECA_HOME', str(home))
    return home


@pytest.fixture(scope='session')
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official ResNet-18 checkpoint in all but its weights, for reading."""
    path = tmp_path_factory.mktemp('official') / 'eca_resnet18_k3577.pth.tar'
    return save_official(path, official_state_dict('eca_resnet18'))


@pytest.fixture(scope='session')
def mobilenetv2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official MobileNetV2 checkpoint in all but its weights, for reading."""
    path = tmp_path_factory.mktemp('official') / 'eca_mobilenetv2_k13.pth.tar'
    return save_official(path, official_state_dict('eca_mobilenetv2'))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint of the official format, `eca_mobilenetv2_050`."""
    torch.save(official_state_dict('eca_mobilenetv2_050'), tmp_path / 'file.pth')
    return tmp_path / 'file.pth'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A Hub on this machine that takes uploads, and the client in this process pointed at it."""
    with HubDouble(orgs=('timm-eca',)) as double:
        point_client_to(double.url, monkeypatch)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setenv('HF_TOKEN', double.token)
        yield double
        assert not [request for request in double.requests if request.status == 501], 'a call the double does not know'
