"""Checks that a folder is what it says: its files against each other, and against the file that it was made of."""
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from timm_eca.conversion.card import render_card
from timm_eca.conversion.reader import read_checkpoint
from timm_eca.errors import first_line, printable
from timm_eca.weights.digests import digest
from timm_eca.weights.key_maps import kernel_sizes_of, to_timm
from timm_eca.weights.model_folder import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    FolderError,
    differing_tensors,
    read_description,
    read_shapes,
    regular_size,
)

__all__ = ['Check', 'verify']


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
    yield from _check_card(folder, name, description.config, metadata)
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


def _check_card(folder: Path, name: str, config: dict[str, Any], metadata: dict[str, str]) -> Iterator[Check]:
    try:
        if regular_size(folder / CARD_FILE) > 2 ** 24:
            raise ValueError('it is larger than any card')
        card = (folder / CARD_FILE).read_text(encoding='utf-8')
    except (OSError, ValueError) as e:
        yield Check(False, f'{CARD_FILE} can\'t be read ({first_line(e)})')
        return
    if 'source_sha256' not in metadata:
        yield Check(None, f'{CARD_FILE} is not that of a conversion: nothing to compare it with')
        return
    try:
        written = render_card(name, config['pretrained_cfg'].get('tag'), config)
    except Exception as e:  # the config is anybody's
        yield Check(False, f'no card can be made of {CONFIG_FILE} ({type(e).__name__}: {first_line(e)})')
        return
    same = card == written
    yield Check(same, f'{CARD_FILE} is what this version makes of {CONFIG_FILE}' if same else (
        f'{CARD_FILE} is not what this version makes of {CONFIG_FILE}: it was edited, or made by another version'))


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
