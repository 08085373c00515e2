"""Weights files that say where their tensors are from, with a digest of each tensor; and digests of files."""
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from timm_eca.version import __version__

__all__ = ['digest', 'file_sha256', 'make_metadata', 'save_weights']


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
        **source: Where the weights are from.
    """
    return {
        'format': 'pt', 'tool': 'timm_eca', 'tool_version': __version__, **source,
        'digests': json.dumps(digests, sort_keys=True),
    }


def save_weights(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of which every byte follows from what is in it.

    safetensors itself puts the metadata in an order that differs from one time to the next, and with it the SHA-256.

    Raises:
        OSError: It can't be written.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as e:
        raise OSError(str(e)) from None
    path.chmod(mode)  # safetensors writes files that other users can't read, whatever the umask
    with open(path, 'r+b') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        ordered = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length  # the same entries, in another order
        file.seek(8)
        file.write(ordered)
