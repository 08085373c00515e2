"""Writes the cards in `hub_cards/`, for maintainers: `PYTHONPATH=. python tests/helpers/hub_cards.py hub_cards`.

They are the cards of the authors' files as this package downloads, converts and publishes them.
"""
import sys
from pathlib import Path

from timm_eca.conversion.card import render_card
from timm_eca.conversion.convert import make_config
from timm_eca.conversion.identify import Identity
from timm_eca.weights.hub import point_to_repository
from timm_eca.weights.official import OFFICIAL, TAG
from timm_eca.weights.store import HUB_ORG

__all__ = ['write_hub_cards']


def write_hub_cards(output: Path) -> None:
    """Writes `<model>.<tag>.md` of each published model to a folder."""
    for model, official in OFFICIAL.items():
        name = f'{model}.{TAG}'
        config = make_config(Identity(model, official.kernel_sizes, 1000, 3), TAG)
        card = point_to_repository(render_card(model, TAG, config, 'downloaded').encode(), f'{HUB_ORG}/{name}')
        (output / f'{name}.md').write_bytes(card)


if __name__ == '__main__':
    write_hub_cards(Path(sys.argv[1]))
