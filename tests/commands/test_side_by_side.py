"""Full disks and several processes: each result is whole, or absent with one sentence."""
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers.forked import fork, run_command, wait
from helpers.hub_double import HubDouble
from helpers.image_folders import FAST, draw
from timm.models import create_model, save_for_hf

from timm_eca.conversion.convert import convert
from timm_eca.conversion.reader import CheckpointError
from timm_eca.conversion.verify import verify
from timm_eca.weights.store import WeightsNotFoundError

pytestmark = pytest.mark.slow


def _fill_disk(size: int) -> None:
    """Lets this process write no file larger than that, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(('size', 'force'), [(0, False), (10 ** 6, True)])
def test_conversion_on_a_full_disk(size: int, force: bool, checkpoint: Path, tmp_path: Path):
    output, arguments = tmp_path / 'output', ['convert', checkpoint, '--output', tmp_path / 'output', '--force']
    if force:
        convert(checkpoint, output)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    status, sentence = run_command(arguments, before=lambda: _fill_disk(size))
    assert status == 2, sentence
    assert sentence.count('\n') == 1
    assert str(output) in sentence
    assert 'name another --output' in sentence
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
    assert run_command(arguments)[0] == 0
    assert all(check.ok is not False for check in verify(output))


def test_training_on_a_full_disk(tmp_path: Path):
    pytest.importorskip('accelerate')
    draw(tmp_path / 'data', {'red': 5, 'green': 5})
    arguments = ['finetune', tmp_path / 'data', *FAST, '--epochs', '1', '--output', tmp_path / 'output']
    for size in (100, 10 ** 6):  # workers share a few bytes by a file in memory
        status, printed = run_command(arguments, before=lambda size=size: _fill_disk(size))
        assert status == 2, printed
        assert printed.splitlines()[-1].startswith('timm-eca: ')
        assert not (tmp_path / 'output' / 'config.json').exists()
    status, printed = run_command(arguments)
    assert status == 0, printed
    assert all(check.ok is not False for check in verify(tmp_path / 'output'))


def test_processes_that_write_the_same_folder(checkpoint: Path, tmp_path: Path):
    for force in False, True:
        shutil.rmtree(tmp_path / 'output', ignore_errors=True)
        children = [
            fork(lambda force=force: _convert_or_status(checkpoint, tmp_path / 'output', force)) for _ in range(3)]
        statuses = Counter(map(wait, children))
        assert statuses[0] >= 1
        assert set(statuses) <= {0, 2}
        assert force or statuses[0] == 1
        assert all(check.ok is not False for check in verify(tmp_path / 'output'))
        assert {path.name for path in tmp_path.iterdir()} <= {'file.pth', 'output', 'home'}


def _convert_or_status(checkpoint: Path, output: Path, force: bool) -> int:
    try:
        convert(checkpoint, output, force=force)
    except CheckpointError:
        return 2
    return 0


def test_a_cache_on_a_full_disk(hub: HubDouble, tmp_path: Path):
    save_for_hf(create_model('test_resnet'), tmp_path / 'plain', safe_serialization=True)
    hub.add_repo(
        'timm/test_resnet.r160_in1k', {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()})

    def load() -> int:
        _fill_disk(10 ** 6)
        try:
            create_model('eca_test_resnet', pretrained=True)
        except WeightsNotFoundError:
            return 2
        return 0

    assert wait(fork(load)) == 2
    assert create_model('eca_test_resnet', pretrained=True) is not None
