"""`timm-eca run`: runs any script with the models registered, as if it had imported the package."""
import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_eca.errors import TimmEcaError

__all__ = ['RunError', 'add_arguments', 'run', 'run_script']

_STARTUP = Path(__file__).parent / 'startup'  # holds a sitecustomize.py


class RunError(TimmEcaError, ValueError):
    """There is no such script or module."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'timm-eca run [-m] SCRIPT [ARGUMENT ...]'
    parser.description = (
        'Runs any Python script, or a module after -m, as if it had imported timm_eca: timm\'s train.py, validate.py, '
        'benchmark.py, bulk_runner.py and onnx_export.py, examples of transformers, your own. It works under torchrun '
        'and accelerate launch: torchrun --nproc-per-node 2 -m timm_eca run train.py ...')
    parser.add_argument('script', help='the script, or -m and the module')
    parser.add_argument('arguments', nargs='*', help='its arguments')


def run(args: argparse.Namespace) -> int:
    return run_script([args.script, *args.arguments])


def run_script(arguments: Sequence[str]) -> int:
    """Runs `SCRIPT [ARGUMENT ...]` or `-m MODULE [ARGUMENT ...]` in this process as Python itself would.

    Python processes that it starts, such as workers of a DataLoader, have the models registered when they import timm,
    unless they ignore `PYTHONPATH` (`python -E` and `-I`) or get another one.

    Returns:
        0, if the script ends by itself.

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
        except (ImportError, ValueError):  # the package around it is missing
            missing = True
        if missing:
            raise RunError(f'there is no module {target}: name an installed one, or a script without -m.')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_STARTUP), os.environ.get('PYTHONPATH')]))
    if as_module:
        runpy.run_module(target, run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(target, run_name='__main__')
    return 0
