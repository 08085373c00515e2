"""Runs functions and commands in forked processes, which need no second import of torch and can be killed."""
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
    """Calls a function in a child process, and returns the number of the child.

    The child exits with the status that the function returns or raises as `SystemExit`, or with 1 and a traceback
    after another exception.

    Args:
        function: The function to call in the child.
        output: The descriptor that gets what the child prints.
    """
    child = os.fork()
    if child == 0:
        sys.dont_write_bytecode = True  # on a full disk Python writes incomplete modules
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
    """Waits for a child, and returns its exit status, or None if it was killed."""
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def call(function: Callable[[], int], seconds: float | None = None) -> tuple[int | None, str]:
    """Calls a function in a child process, and kills the child after a time, if one is given.

    Returns:
        The exit status, or None if the child was killed, and what the child printed.
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
    """Runs a command as `call` does. The child calls `before` first."""
    def run() -> int:
        before()
        return main([str(argument) for argument in arguments])
    return call(run, seconds)


def import_anew() -> None:
    """Makes a child import the package again."""
    for name in [name for name in sys.modules if name.partition('.')[0] == 'timm_eca']:
        del sys.modules[name]
    warnings.filterwarnings('ignore', 'Overwriting')  # timm warns of models that are registered again
