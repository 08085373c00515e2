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
import json, os, sys
import helper_beside_it
import timm
print(json.dumps([__name__, __file__, sys.argv, sys.path[0], timm.is_model('eca_resnet50'), helper_beside_it.VALUE]))
'''

WORKERS = '''
import sys
import timm
from torch.utils.data import DataLoader, Dataset


class Registered(Dataset):
    def __init__(self, model=None):
        self.model = model  # a pickle of it imports timm_eca

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return int(timm.is_model('eca_resnet50'))


if __name__ == '__main__':
    model = timm.create_model('eca_test_resnet')
    for method, dataset in ('fork', Registered()), ('spawn', Registered(model)):
        print(method, [x.item() for x in DataLoader(dataset, num_workers=1, multiprocessing_context=method)])
'''


def start(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=180)


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
    for command in (['timm-eca'], ['-m', 'timm_eca'], ['-u', '-m', 'timm_eca']):
        assert start(*command, 'run', 'clone/train.py', cwd=tmp_path).stderr == 'the clone\n'


@pytest.mark.parametrize(('code', 'status', 'words'), [
    ('import sys; sys.exit(3)', 3, ''), ('raise SystemExit', 0, ''), ('raise KeyError("x")', 1, 'Traceback'),
    ('from timm_eca.errors import TimmEcaError; raise TimmEcaError("x")', 1, 'Traceback'),
])
def test_exit_status(code: str, status: int, words: str, tmp_path: Path):
    (tmp_path / 'script.py').write_text(code)
    found, printed = run_forked('script.py', cwd=tmp_path)
    assert found == status
    assert words in printed


@pytest.mark.slow
def test_workers_have_the_models(tmp_path: Path):
    (tmp_path / 'script.py').write_text(WORKERS)
    done = start('-m', 'timm_eca', 'run', 'script.py', cwd=tmp_path)
    assert done.stdout.splitlines() == ['fork [1, 1]', 'spawn [1, 1]'], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [
    ('torch.distributed.run', '--nproc-per-node', '1', '--master-port', '{port}', '-m'),
    ('accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
     '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '{port}', '-m'),
], ids=['torchrun', 'accelerate launch'])
def test_under_launchers(tmp_path: Path, launcher: tuple[str, ...]):
    pytest.importorskip(launcher[0].partition('.')[0])
    (tmp_path / 'script.py').write_text(
        'import os, sys, timm\n'
        'rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]\n'
        'open(f"{rank} of {count}", "w").write(f"{sys.argv[1:]} {timm.is_model(\'eca_resnet50\')}")\n')
    port = str(20000 + os.getpid() % 20000)
    done = start(
        '-m', *(word.format(port=port) for word in launcher), 'timm_eca', 'run', 'script.py', '--flag', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count = 1 if launcher[0].startswith('torch') else 2  # accelerate starts torchrun for the two
    assert [(tmp_path / f'{rank} of {count}').read_text() for rank in range(count)] == ["['--flag'] True"] * count
