"""`timm-eca run`: a script runs as Python itself runs it, with the models registered."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import run_command

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import json, sys
import helper_beside_it
import timm
print(json.dumps([__name__, __file__, sys.argv, sys.path[0], timm.is_model('eca_resnet50'), helper_beside_it.VALUE]))
'''

WORKERS = '''
import timm
from torch.utils.data import DataLoader

class Registered:
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return int(timm.is_model('eca_resnet50'))

print([x.item() for x in DataLoader(Registered(), num_workers=1, multiprocessing_context='fork')])
'''


def run_forked(*arguments: str, cwd: Path) -> tuple[int | None, str]:
    """The exit status of a script, and the text that it prints, without another import of timm."""
    return run_command(['run', *arguments], before=lambda: os.chdir(cwd))


def test_script(tmp_path: Path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'script.py').write_text(SCRIPT)
    (folder / 'helper_beside_it.py').write_text('VALUE = 7')
    arguments = ['scripts/script.py', '--model', 'x', '-m', '-h', '--', '--json']
    status, printed = run_forked(*arguments, cwd=tmp_path)
    assert status == 0, printed
    assert json.loads(printed) == ['__main__', 'scripts/script.py', arguments, str(folder), True, 7]


def test_module(tmp_path: Path):
    package = tmp_path / 'package'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'tool.py').write_text('import sys, timm; print(__name__, sys.argv[1:], timm.is_model("eca_resnet50"))')
    assert run_forked('-m', 'package.tool', '-x', '1', cwd=tmp_path) == (0, "__main__ ['-x', '1'] True\n")


def test_timm_beside_the_script(tmp_path: Path):
    """In a clone of timm the script uses the clone, wherever it is started."""
    (tmp_path / 'clone' / 'timm').mkdir(parents=True)
    (tmp_path / 'clone' / 'timm' / '__init__.py').write_text('raise SystemExit("the clone")')
    (tmp_path / 'clone' / 'train.py').write_text('import timm')
    (tmp_path / 'timm-eca').write_text('from timm_eca.commands.main import main; main()')
    for command in (['timm-eca'], ['-m', 'timm_eca']):
        done = subprocess.run(
            [sys.executable, *command, 'run', 'clone/train.py'], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)})
        assert done.stderr == 'the clone\n'


@pytest.mark.parametrize(('code', 'status', 'words'), [
    ('import sys; sys.exit(3)', 3, ''), ('raise SystemExit', 0, ''), ('raise KeyError("x")', 1, 'Traceback'),
    ('from timm_eca.errors import TimmEcaError; raise TimmEcaError("x")', 1, 'Traceback'),
])
def test_exit_status(code: str, status: int, words: str, tmp_path: Path):
    (tmp_path / 'script.py').write_text(code)
    found, printed = run_forked('script.py', cwd=tmp_path)
    assert found == status
    assert words in printed


@pytest.mark.parametrize(('arguments', 'words'), [
    (['-m', 'absent.tool'], 'there is no module absent.tool'), (['-m'], 'name a module after -m'),
])
def test_what_is_not_there(arguments: list[str], words: str, tmp_path: Path):
    status, printed = run_forked(*arguments, cwd=tmp_path)
    assert status == 2
    assert words in printed


def test_workers_have_the_models(tmp_path: Path):
    (tmp_path / 'script.py').write_text(WORKERS)
    assert run_forked('script.py', cwd=tmp_path) == (0, '[1, 1]\n')


@pytest.mark.slow
def test_under_launchers(tmp_path: Path):
    pytest.importorskip('accelerate')
    (tmp_path / 'script.py').write_text(
        'import os, sys, timm\n'
        'rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]\n'
        'open(f"{rank} of {count}", "w").write(f"{sys.argv[1:]} {timm.is_model(\'eca_resnet50\')}")\n')
    launcher = [  # it starts torchrun
        '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
        '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(20000 + os.getpid() % 20000)]
    done = subprocess.run(
        [sys.executable, *launcher, '-m', 'timm_eca', 'run', 'script.py', '--flag'], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f'{rank} of 2').read_text() for rank in range(2)] == ["['--flag'] True"] * 2
