"""`timm-eca run`: somebody else's script runs as Python itself would run it, with the models registered."""
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
import timm
from torch.utils.data import DataLoader, Dataset


class Registered(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return int(timm.is_model('eca_resnet50'))


if __name__ == '__main__':
    for method in ('spawn', 'forkserver', 'fork'):
        print(method, [x.item() for x in DataLoader(Registered(), num_workers=1, multiprocessing_context=method)])
'''


def run(*arguments: str, cwd: Path, launcher: tuple[str, ...] = ()) -> str:
    """What a script prints in a process of its own."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    python = (sys.executable, '-m', *launcher)
    done = subprocess.run(
        [*python, 'timm_eca', 'run', *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_forked(*arguments: str, cwd: Path, path: tuple[Path, ...] = (ROOT,)) -> tuple[int | None, str]:
    """The exit status of a script, and what it prints, without another import of timm."""
    def prepare() -> None:
        os.chdir(cwd)
        os.environ['PYTHONPATH'] = os.pathsep.join(map(str, path))
        os.dup2(sys.stdout.fileno(), 1)  # for the processes of the script
        os.dup2(sys.stderr.fileno(), 2)

    return run_command(['run', *arguments], before=prepare)


def test_script(tmp_path: Path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'script.py').write_text(SCRIPT)
    (folder / 'helper_beside_it.py').write_text('VALUE = 7')
    printed = run('scripts/script.py', '--model', 'x', '-m', '-h', '--', '--json', cwd=tmp_path)
    arguments = ['scripts/script.py', '--model', 'x', '-m', '-h', '--', '--json']
    assert printed.strip() == str(
        ['__main__', 'scripts/script.py', arguments, str(folder), True, 7]).replace("'", '"').replace('True', 'true')


def test_module(tmp_path: Path):
    package = tmp_path / 'package'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'tool.py').write_text('import sys, timm; print(__name__, sys.argv[1:], timm.is_model("eca_resnet50"))')
    assert run_forked('-m', 'package.tool', '-x', '1', cwd=tmp_path) == (0, "__main__ ['-x', '1'] True\n")


@pytest.mark.parametrize(('code', 'status'), [
    ('import sys; sys.exit(3)', 3), ('raise SystemExit', 0), ('raise KeyError("x")', 1),
])
def test_exit_status(code: str, status: int, tmp_path: Path):
    (tmp_path / 'script.py').write_text(code)
    assert run_forked('script.py', cwd=tmp_path)[0] == status


@pytest.mark.slow
def test_workers_have_the_models(tmp_path: Path):
    (tmp_path / 'script.py').write_text(WORKERS)
    assert run('script.py', cwd=tmp_path).splitlines() == ['spawn [1, 1]', 'forkserver [1, 1]', 'fork [1, 1]']


STARTS = 'import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)'


@pytest.mark.slow
def test_processes_of_the_script_have_the_models(tmp_path: Path):
    """Such as those of timm's bulk_runner.py, also where the user has a sitecustomize, which still runs."""
    (tmp_path / 'script.py').write_text(STARTS)
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'sitecustomize.py').write_text('import os; os.environ["CUSTOMIZED"] = "yes"')
    (tmp_path / 'child.py').write_text(
        'import importlib.util, os, sys\n'
        'assert importlib.util.find_spec("timm")\n'  # as transformers asks for it
        'assert "torch" not in sys.modules\n'
        'import timm.models\n'
        'print(timm.create_model("eca_test_resnet", num_classes=3).num_classes, sys.argv, os.environ["CUSTOMIZED"])\n')
    done = run_forked('script.py', 'child.py', '--flag', cwd=tmp_path, path=(tmp_path / 'site', ROOT))
    assert done == (0, "3 ['child.py', '--flag'] yes\n")


def test_processes_of_the_script_import_nothing_more(tmp_path: Path):
    (tmp_path / 'script.py').write_text(STARTS)
    assert run_forked('script.py', '-c', 'import json, sys; print("timm" in sys.modules)', cwd=tmp_path) == (
        0, 'False\n')


@pytest.mark.parametrize(('arguments', 'words'), [
    (('absent.py',), 'absent.py does not exist'), (('-m', 'absent_module'), 'no module absent_module'),
    (('-m', 'absent.package.module'), 'no module absent.package.module'), (('-m',), 'nothing to run'),
])
def test_what_is_not_there(
        arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    status, printed = run_command(['run', *arguments])
    assert status == 2
    assert words in printed
    assert printed.count('\n') == 1


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
    run('script.py', '--flag', cwd=tmp_path, launcher=tuple(word.format(port=port) for word in launcher))
    count = 1 if launcher[0].startswith('torch') else 2  # accelerate starts torchrun for the two
    assert [(tmp_path / f'{rank} of {count}').read_text() for rank in range(count)] == ["['--flag'] True"] * count
