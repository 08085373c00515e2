"""`timm-eca cards`."""
import argparse
from functools import partial
from pathlib import Path

from timm_eca.commands.writing import writing
from timm_eca.conversion.card import render_card
from timm_eca.conversion.convert import make_config
from timm_eca.conversion.identify import Identity
from timm_eca.weights.atomic import atomic_write
from timm_eca.weights.official import OFFICIAL, TAG

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('output', help='folder for <model>.<tag>.md')


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for model, official in OFFICIAL.items():
            card = render_card(model, TAG, make_config(Identity(model, official.kernel_sizes, 1000, 3), TAG))
            atomic_write(output / f'{model}.{TAG}.md', partial(Path.write_text, data=card, encoding='utf-8'))
    return 0
