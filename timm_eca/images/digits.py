"""scikit-learn's images of handwritten digits."""
import os
from typing import Any

__all__ = ['DIGITS', 'is_digits', 'read_digits']

DIGITS = 'digits'


def is_digits(data: str) -> bool:
    """Whether a name means scikit-learn's digits. A folder of this name comes first."""
    return data == DIGITS and not os.path.isdir(data)


def read_digits(mode: str) -> tuple[list[Any], list[int]]:
    """1,797 images of 8x8 pixels, in one of Pillow's modes, and their digits.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    # Imported here: the command line imports this module to show its help.
    from PIL import Image
    from sklearn.datasets import load_digits
    digits: Any = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype('uint8')  # from 17 levels of grey
    return [Image.fromarray(image).convert(mode) for image in pixels], digits.target.tolist()
