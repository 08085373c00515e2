"""`timm-eca run`: runs a Python script with the models registered."""
import argparse
import os
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'timm-eca run [-m] SCRIPT [ARGUMENT ...]'
    parser.description = (
        'Runs a Python script, or a module after -m, as if it had imported timm_eca: timm\'s train.py, validate.py, '
        'benchmark.py and onnx_export.py, examples of transformers, your own. It works under torchrun and accelerate '
        'launch: torchrun --nproc-per-node 2 -m timm_eca run train.py ... The script\'s folder comes first on the '
        'path: in a clone of timm, the clone is used. New Python processes that the script starts (also by the '
        'methods spawn and forkserver) must import timm_eca themselves.')
    parser.add_argument(
        'script', metavar='SCRIPT', nargs='+', help='the script (with -m: the module), followed by its arguments')


def run(args: argparse.Namespace) -> int:
    """Runs the script in this process, as Python itself runs it. What the script raises is not caught."""
    as_module = args.script[0] == '-m'
    target, *rest = args.script[as_module:] or ['']
    if not target:
        args.parser.error('name a module after -m.')
    if not as_module and not Path(target).exists():
        args.parser.error(f'{target} does not exist: name a Python script, or a module after -m.')
    sys.argv = [target, *rest]
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.11 on
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(target))
    if as_module:
        try:
            missing = find_spec(target) is None
        except (ImportError, ValueError):  # the package around it is missing
            missing = True
        if missing:
            args.parser.error(f'there is no module {target}: name an installed one, or a script without -m.')
    import_module('timm_eca.models.registration')  # imports timm, which may be in the script's folder
    if as_module:
        runpy.run_module(target, run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(target, run_name='__main__')
    return 0
