"""Checks that a folder is what it says: its weights, its config, and the file that it was converted from."""
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from timm_eca.conversion.reader import read_checkpoint
from timm_eca.errors import first_line, printable
from timm_eca.weights.digests import digest
from timm_eca.weights.key_maps import kernel_sizes_of, to_timm
from timm_eca.weights.model_folder import (
    CONFIG_FILE, WEIGHTS_FILE, FolderError, differing_tensors, read_description, read_shapes,
)

__all__ = ['Check', 'verify']


_PROVENANCE = {
    'sha256': 'the authors\' file by its SHA-256', 'downloaded': 'downloaded from the authors\' address',
    'best_prec1': 'taken for the authors\' file because it records their accuracy',
    'vouched': 'taken for the authors\' file because the user vouched for it',
}


class Check(NamedTuple):
    """One thing that was looked at."""
    ok: bool | None  # None where there is nothing to compare with
    what: str


def verify(folder: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> Iterator[Check]:
    """Checks a folder that `convert` or `finetune` made, one thing after the other.

    Args:
        folder: The folder.
        checkpoint: The file that it was converted from, to compare every tensor with.

    Raises:
        CheckpointError: The checkpoint can't be read.
    """
    folder = Path(folder)
    try:
        description = read_description(folder)
        shapes = read_shapes(folder)
        different = differing_tensors(folder, description.architecture, shapes)
    except FolderError as e:
        yield Check(False, str(e))
        return
    if not (folder / WEIGHTS_FILE).exists():
        yield Check(None, f'{folder} has a pickled state dict, no {WEIGHTS_FILE}, which alone can hold digests')
        return
    name = description.architecture
    described = f'those of {name}, as {CONFIG_FILE} describes it'
    yield Check(not different, f'the tensors are {described}' if not different else (
        f'{len(different)} tensors are not {described}, {printable(different[0])} the first'))
    with safe_open(folder / WEIGHTS_FILE, framework='pt') as file:
        metadata = file.metadata() or {}
        found = {key: file.get_tensor(key) for key in shapes}
    yield from _check_kernel_sizes(description.model_args.get('kernel_sizes'), found)
    bad = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    yield Check(not bad, f'NaN or Inf in {printable(bad[0])}' if bad else 'no NaN, no Inf')
    digests = {key: digest(value) for key, value in found.items()}
    yield from _check_digests(metadata, digests)
    provenance = metadata.get('provenance')
    if provenance != description.config.get('provenance'):
        yield Check(False, f'the provenance is not the same in {CONFIG_FILE} and {WEIGHTS_FILE}')
    if 'source_sha256' in metadata:
        provenance = _PROVENANCE.get(str(provenance), 'not known to be the authors\' file')
        source = printable(f'{metadata.get("source")}, SHA-256 {metadata["source_sha256"]}', 400)
        yield Check(None, f'converted from {source}, {provenance}')
    if checkpoint is not None:
        yield from _check_source(checkpoint, metadata, digests)


def _check_kernel_sizes(described: Any, found: dict[str, torch.Tensor]) -> Iterator[Check]:
    if isinstance(described, list):
        try:
            actual: Any = kernel_sizes_of(found)
        except (IndexError, KeyError, ValueError) as e:
            actual = first_line(e)
        yield Check(described == actual, f'kernel sizes: {described} in {CONFIG_FILE}, {actual} in the tensors')


def _differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))


def _check_digests(metadata: dict[str, str], found: dict[str, str]) -> Iterator[Check]:
    try:
        recorded = {str(key): value for key, value in json.loads(metadata['digests']).items()}
    except (AttributeError, KeyError, ValueError, RecursionError):
        yield Check(None, f'{WEIGHTS_FILE} has no digests of its tensors: convert the weights again to have them')
        return
    changed = _differences(recorded, found)
    yield Check(not changed, f'the {len(found)} tensors have their recorded digests' if not changed else (
        f'{len(changed)} tensors are not what was written: {", ".join(map(printable, changed[:5]))}'))


def _check_source(
        checkpoint: str | os.PathLike,
        metadata: dict[str, str],
        found: dict[str, str],
) -> Iterator[Check]:
    source = read_checkpoint(checkpoint)
    recorded = printable(metadata.get('source_sha256', 'none'))
    yield Check(
        recorded == source.sha256,
        f'sha256 of the source: {recorded} recorded, {source.sha256} of {os.fspath(checkpoint)}')
    changed = _differences({key: digest(value) for key, value in to_timm(source.state_dict).items()}, found)
    yield Check(not changed, f'the {len(found)} tensors are the source\'s, bit for bit' if not changed else (
        f'{len(changed)} tensors are not the source\'s: {", ".join(map(printable, changed[:5]))}'))
