"""Runs the command line in a forked process, which costs no second import of torch, and may be killed or limited."""
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from timm_eca.commands.main import main

__all__ = ['fork', 'run_command', 'wait']


def fork(function: Callable[[], int], output: int | None = None) -> int:
    """Calls a function in a child process, whose exit status is what it returns. The child's number.

    Args:
        function: Is called in the child.
        output: Descriptor that gets what the child prints.
    """
    child = os.fork()
    if child == 0:
        try:
            descriptor = os.open(os.devnull, os.O_WRONLY) if output is None else output
            sys.stdout = sys.stderr = os.fdopen(descriptor, 'w', buffering=1)
            torch.set_num_threads(1)
            os._exit(function())
        finally:
            os._exit(70)
    return child


def wait(child: int) -> int | None:
    """The exit status of a child, or None where it was killed."""
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def run_command(
        arguments: Sequence[str | Path],
        seconds: float | None = None,
        before: Callable[[], None] = lambda: None,
) -> tuple[int | None, str]:
    """Runs a command, killed by SIGKILL after a time. Its exit status, None where it was killed, and what it printed.

    Args:
        arguments: The command line.
        seconds: When to kill it, if at all.
        before: What to call in the child first.
    """
    def run() -> int:
        before()
        return main([str(argument) for argument in arguments])

    read, write = os.pipe()
    child = fork(run, write)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(read) as printed:
        text = printed.read()
    return wait(child), text
