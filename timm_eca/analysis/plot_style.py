"""How all figures are drawn: names in any script, no formulas, and nothing changed for the user's own plots."""
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm_eca.weights.atomic import atomic_write

__all__ = ['plot_style', 'save_figure']

_LENGTH = 28  # of a name, in characters
_JOINERS = '\u200c\u200d'  # format characters that Persian and Indic words need


@contextmanager
def plot_style(names: Sequence[str] = ()) -> Iterator[list[str]]:
    """Draws figures with fonts for the names of classes, the middle of long ones left out, and without formulas.

    Args:
        names: Names of classes, in any script.

    Returns:
        A label for each name. Characters that no font has are escaped.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    # Nothing of the middle of a very long name is ever shown.
    names = [unicodedata.normalize('NFC', n if len(n) < 4 * _LENGTH else n[:_LENGTH] + n[-_LENGTH:]) for n in names]
    characters = {c for name in names for c in name if c.isprintable() or c in _JOINERS}
    families, missing = _find_fonts(characters)
    labels = [_shorten([c if c in characters - missing else ascii(c)[1:-1] for c in name]) for name in names]
    counts = Counter(labels)
    settings: dict[Any, Any] = {
        'font.family': families, 'text.usetex': False, 'text.parse_math': False, 'axes.formatter.use_mathtext': False,
        'pdf.fonttype': 42,  # TrueType: publishers refuse the default
    }
    with matplotlib.rc_context(settings):
        yield [label if counts[label] == 1 else f'{i}: {label}' for i, label in enumerate(labels)]


def _shorten(characters: list[str]) -> str:
    if sum(map(len, characters)) > _LENGTH:
        while sum(map(len, characters)) > _LENGTH - 3:
            del characters[len(characters) // 2]
        characters.insert((len(characters) + 1) // 2, '...')
    return ''.join(characters)


def _find_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """The families of the user's settings and of others that have the rest of some characters, and what none has."""
    from matplotlib import font_manager, rcParams

    def without(missing: set[str], file: Any) -> set[str]:
        return {c for c in missing if ord(c) not in font_manager.get_font(file).get_charmap()}

    families, missing = list(rcParams['font.family']), characters
    for family in families:
        missing = without(missing, font_manager.findfont(font_manager.FontProperties(family=[family])))
    others = {
        font.name: font.fname for font in font_manager.fontManager.ttflist
        if font.style == 'normal' and font.weight in (400, 'normal') and not font.name.startswith('Last Resort')
    }  # the last resort has boxes for all characters
    while missing and others:
        left = {name: without(missing, file) for name, file in others.items()}
        best = min(sorted(left), key=lambda name: len(left[name]))
        if left[best] == missing:
            break
        families, missing = [*families, best], left[best]
    return families, missing


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure in the format of the name's suffix, whole or not at all.

    Raises:
        OSError: It can't be written.
    """
    atomic_write(path, lambda new: figure.savefig(new, dpi=150, bbox_inches='tight'))
