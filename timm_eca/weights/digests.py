"""Weights files that say where their tensors are from, with a digest of each tensor; and digests of files."""
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import save

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
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def make_metadata(digests: Mapping[str, str], **source: str) -> dict[str, str]:
    """The metadata of a safetensors file: where its weights are from, and the digest of each tensor by its name."""
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
    data = memoryview(save(dict(tensors), dict(metadata)))
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(bytes(data[8:8 + length]))
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    ordered = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(length)
    with path.open('wb') as file:
        file.writelines([data[:8], ordered, data[8 + length:]])
