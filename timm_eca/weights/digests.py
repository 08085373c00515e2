"""SHA-256 digests of tensors and files, and safetensors files that record them."""
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open
from safetensors.torch import save

from timm_eca.version import __version__

__all__ = ['digest', 'file_sha256', 'make_metadata', 'read_metadata', 'save_weights']


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's data type, shape and content, in hexadecimal digits."""
    sha256 = hashlib.sha256(f'{tensor.dtype} {list(tensor.shape)} '.encode())
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    sha256.update(content)
    return sha256.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def make_metadata(digests: Mapping[str, str], **source: str) -> dict[str, str]:
    """The metadata of a safetensors file: the source of its weights, and the digest of each tensor by name."""
    return {
        'format': 'pt', 'tool': 'timm_eca', 'tool_version': __version__, **source,
        'digests': json.dumps(digests, sort_keys=True),
    }


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework='pt') as file:
        return file.metadata() or {}


def save_weights(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the mode that the umask gives. An OSError means that it can't be written."""
    path.unlink(missing_ok=True)  # an existing file would keep its mode
    path.write_bytes(save(dict(tensors), dict(metadata)))  # safetensors' save_file makes files of mode 0600
