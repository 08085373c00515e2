"""`timm-eca run`: anybody's script with the models registered, as if it had imported the package."""
import argparse
import importlib.util
import multiprocessing
import os
import runpy
import sys
import types
from collections.abc import Sequence
from multiprocessing import spawn
from pathlib import Path

from timm_eca.errors import TimmEcaError

__all__ = ['RunError', 'add_arguments', 'run', 'run_script']


class RunError(TimmEcaError, ValueError):
    """What was to be run isn't there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'timm-eca run [-m] SCRIPT [ARGUMENT ...]'
    parser.description = (
        'Runs any Python script, or a module after -m, as if it had imported timm_eca: timm\'s train.py, validate.py, '
        'benchmark.py and onnx_export.py, examples of transformers, your own. It goes below torchrun and accelerate '
        'launch: torchrun --nproc-per-node 2 -m timm_eca run train.py ...')
    parser.add_argument('script', help='the script, or -m and the module')
    parser.add_argument('arguments', nargs='*', help='its arguments')


def run(args: argparse.Namespace) -> int:
    return run_script([args.script, *args.arguments])


def run_script(arguments: Sequence[str]) -> int:
    """Runs `SCRIPT [ARGUMENT ...]` or `-m MODULE [ARGUMENT ...]` in this process as Python itself would.

    `sys.argv`, `sys.path[0]`, `__file__` and `__name__` are the script's own, its exit status and tracebacks, too.
    Processes that it starts by `multiprocessing`, such as workers of a DataLoader, have the models registered as well.

    Args:
        arguments: The command line after `run`.

    Returns:
        0, where the script ends by itself.

    Raises:
        RunError: There is no such script or module.
        BaseException: Whatever the script raises, `SystemExit` among it.
    """
    as_module = arguments[:1] == ['-m']
    target, *rest = arguments[as_module:] or ['']
    if not target:
        raise RunError('nothing to run: name a script, or a module after -m.')
    if as_module:
        entry = os.getcwd()
    elif Path(target).exists():
        entry = os.path.dirname(os.path.realpath(target))
    else:
        raise RunError(f'{target} does not exist: name a Python script, or a module after -m.')
    sys.argv = [target, *rest]
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.11 on
        sys.path[0] = entry
    if as_module:
        try:
            missing = importlib.util.find_spec(target) is None
        except (ImportError, ValueError):  # no such package around it
            missing = True
        if missing:
            raise RunError(f'there is no module {target}: name an installed one, or a script without -m.')
    _register_in_workers()
    sys.excepthook = _show_from_script_on
    if as_module:
        runpy.run_module(target, run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(target, run_name='__main__')
    return 0


def _register_in_workers() -> None:
    """Has processes that are spawned import the package first; those that are forked have it."""
    multiprocessing.set_forkserver_preload(['__main__', 'timm_eca'])
    # Private: multiprocessing has no public way to run something first in the processes that it spawns.
    get_command_line = spawn.get_command_line

    def get_command_line_importing(**kwds: object) -> list[str]:
        command = get_command_line(**kwds)
        if '-c' in command:  # a frozen executable has no program to be changed
            program = command.index('-c') + 1
            command[program] = f'import timm_eca; {command[program]}'
        return command
    spawn.get_command_line = get_command_line_importing


def _show_from_script_on(
        kind: type[BaseException],
        error: BaseException,
        traceback: types.TracebackType | None,
) -> None:
    """Prints a traceback without what this module and `runpy` did before the script began."""
    own = (__file__, runpy.__file__, runpy.run_path.__code__.co_filename)
    first = traceback
    while first is not None and (
            first.tb_frame.f_code.co_filename in own or first.tb_frame.f_globals.get('__package__') == 'timm_eca'):
        first = first.tb_next
    sys.__excepthook__(kind, error.with_traceback(first or traceback), first or traceback)

