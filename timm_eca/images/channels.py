"""Means and standard deviations of the input channels."""
import math
from collections.abc import Sequence

from timm_eca.images.reader import ImageError

__all__ = ['by_channel']


def by_channel(
        values: Sequence[float] | None,
        default: Sequence[float],
        in_chans: int,
        positive: bool = False,
) -> tuple[float, ...]:
    """Means or standard deviations for each channel. Channels that are not RGB get the average of the default."""
    if values is None:
        values = default if len(default) == in_chans else [round(sum(default) / len(default), 4)]
    if len(values) not in (1, in_chans) or not all((0 if positive else -math.inf) < v < math.inf for v in values):
        raise ImageError(
            f'Invalid {"--std" if positive else "--mean"} {tuple(values)}',
            f'give one {"positive " * positive}number, or one for each of the {in_chans} input channels')
    return tuple(values) * (in_chans // len(values))
