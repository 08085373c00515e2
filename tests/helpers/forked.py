"""Runs functions and commands in forked processes, without a second import of torch; they may be killed or limited."""
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from timm_eca.commands.main import main

__all__ = ['call', 'fork', 'import_anew', 'run_command', 'wait']


def fork(function: Callable[[], int], output: int | None = None) -> int:
    """Calls a function in a child process, which ends as Python itself does: with the exit status that it returns or
    raises as `SystemExit`, or with 1 and a traceback after another exception. The child's number.

    Args:
        function: Is called in the child.
        output: Descriptor that gets what the child prints.
    """
    child = os.fork()
    if child == 0:
        sys.dont_write_bytecode = True  # on a full disk Python leaves modules cut off, for all that come after it
        try:
            descriptor = os.open(os.devnull, os.O_WRONLY) if output is None else output
            sys.stdout = sys.stderr = os.fdopen(descriptor, 'w', buffering=1)
            torch.set_num_threads(1)
            os._exit(function())
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else e.code is not None)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def wait(child: int) -> int | None:
    """The exit status of a child, or None where it was killed."""
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def call(function: Callable[[], int], seconds: float | None = None) -> tuple[int | None, str]:
    """Calls a function in a child process that is killed by SIGKILL after a time, if one is given.

    Returns:
        Its exit status, None where it was killed, and what it printed.
    """
    read, write = os.pipe()
    child = fork(function, write)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(read) as printed:
        text = printed.read()
    return wait(child), text


def run_command(
        arguments: Sequence[str | Path],
        seconds: float | None = None,
        before: Callable[[], None] = lambda: None,
) -> tuple[int | None, str]:
    """Runs a command as `call` does, and something in the child before it."""
    def run() -> int:
        before()
        return main([str(argument) for argument in arguments])
    return call(run, seconds)


def import_anew() -> None:
    """Has a child import the package again, as if it had not been imported yet."""
    for name in [name for name in sys.modules if name.partition('.')[0] == 'timm_eca']:
        del sys.modules[name]
    warnings.filterwarnings('ignore', 'Overwriting')  # timm's, of the models that are registered again
