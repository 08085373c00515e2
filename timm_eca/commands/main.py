"""The command line: `timm-eca`, `python -m timm_eca` and `convert_weights.py`.

Each command is a module of this package with `add_arguments(parser)` and `run(args)`. At module level it imports
nothing that imports torch, so that `--help` answers at once. Only the module of the chosen command is imported.
"""
import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from timm_eca.commands.process import limit_waiting
from timm_eca.errors import TimmEcaError
from timm_eca.version import __version__

__all__ = ['COMMANDS', 'main']

# Each command with its line in the help. Users need them in this order.
COMMANDS = {
    'list': 'show the models and their weights',
    'finetune': 'train a model on your images',
    'predict': 'classify images',
    'evaluate': 'measure the accuracy of a model on images by class',
    'gates': 'show the channel weights that ECA computes from images',
    'run': 'run a Python script with the models registered',
    'convert': "convert a checkpoint of ECA-Net's authors for timm and the Hub",
    'verify': 'check the weights and the config of a folder',
    'export': 'write a model with ECA as a folder that timm loads without timm_eca',
    'push': 'publish a folder on the Hugging Face Hub',
}
EPILOG = """\
examples:
  timm-eca list "*mobilenet*"
  timm-eca finetune photos/ --model eca_resnet50.a1_in1k --output my-model
  timm-eca predict photo.jpg --model my-model

"timm-eca COMMAND --help" describes the options of a command.
"""


class _Parser(argparse.ArgumentParser):
    """A parser with short errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message}\nSee {self.prog} --help.\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status of the command. It is 2 for bad input, with a sentence on stderr.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if args.command == 'run':  # the script has settings and errors of its own
        return args.run(args)
    limit_waiting()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # file names may hold any bytes
    try:
        import_module('timm_eca.models.registration')
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader closed the pipe, e.g. `timm-eca list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes more at exit
        return 1
    except TimmEcaError as e:
        print(f'timm-eca: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog='timm-eca', description='ECA-Net for timm.', epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--version', action='version', version=f'timm_eca {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    chosen = next((argument for argument in arguments if not argument.startswith('-')), None)
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, allow_abbrev=False)
        if name == chosen:
            module = import_module(f'timm_eca.commands.{name}')
            module.add_arguments(command)
            command.set_defaults(command=name, run=module.run, parser=command)
    if not arguments:
        parser.print_help()
        parser.exit()
    if arguments[0] == 'run' and arguments[1:] not in (['-h'], ['--help']):
        arguments = ['run', '--', *arguments[1:]]  # the options that follow belong to the script
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        args.parser.error(f'unknown arguments: {" ".join(unknown)}')
    return args
