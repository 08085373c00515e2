"""What a weights file says about itself: where its tensors are from, and a digest of each; and digests of files."""
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from timm_eca.version import __version__

__all__ = ['digest', 'file_sha256', 'make_metadata']


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's data type, shape and content, in hexadecimal digits."""
    sha256 = hashlib.sha256(f'{tensor.dtype} {list(tensor.shape)} '.encode())
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    sha256.update(content)
    return sha256.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def make_metadata(digests: Mapping[str, str], **source: str) -> dict[str, str]:
    """The metadata of a safetensors file.

    Args:
        digests: The digest of each tensor, by its name in the file.
        **source: What the weights are from.
    """
    return {
        'format': 'pt', 'tool': 'timm_eca', 'tool_version': __version__, **source,
        'digests': json.dumps(digests, sort_keys=True),
    }
