"""The command line: `timm-eca`, `python -m timm_eca` and `convert_weights.py`.

Each command is a module of this package with `add_arguments(parser)` and `run(args)`, imported where it is the one that
runs.
"""
import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from timm_eca.commands.hub_client import limit_waiting
from timm_eca.commands.run import RunError, run_script
from timm_eca.errors import TimmEcaError
from timm_eca.version import __version__

__all__ = ['COMMANDS', 'main']

# Each command with its line in the help.
COMMANDS = {
    'list': 'the models, and where their weights are',
    'predict': 'classify images',
    'finetune': 'train a model on images, and make a folder for timm and the Hub of it',
    'gates': 'the channel weights that ECA computes, by block',
    'convert': "make a folder for timm and the Hub of a checkpoint of the authors' code",
    'verify': 'check that a folder is what it says',
    'push': 'publish a folder on the Hugging Face Hub, in one commit',
    'run': 'run a script with the models registered',
    'cards': 'write the cards of the published models',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 0, or 2 with one sentence on stderr for bad input."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ['run'] and arguments[1:] not in ([], ['-h'], ['--help']):
        # What follows is somebody else's: its options, and what it raises.
        try:
            return run_script(arguments[1:])
        except RunError as e:
            print(f'timm-eca: {e}', file=sys.stderr)
            return 2
    args = _make_parser(arguments).parse_args(arguments)
    limit_waiting()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # the names of files may be of any bytes
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has had enough, e.g. `timm-eca list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there at exit
        return 1
    except TimmEcaError as e:
        print(f'timm-eca: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-eca', description='ECA-Net for timm.')
    parser.add_argument('--version', action='version', version=f'timm_eca {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name == next((argument for argument in arguments if not argument.startswith('-')), None):
            module = import_module(f'timm_eca.commands.{name}')
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    return parser
