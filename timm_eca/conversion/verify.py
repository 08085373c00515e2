"""Checks that a folder is what it says: its weights, its config, and the file that it was converted from."""
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from timm_eca.conversion.reader import Checkpoint, read_checkpoint
from timm_eca.errors import first_line, printable
from timm_eca.weights.digests import digest
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.model_folder import CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder, weights_path
from timm_eca.weights.official import PROVENANCES

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
        config = check_folder(folder)
    except FolderError as e:
        yield Check(False, str(e))
        return
    yield Check(True, f'the tensors are those of {config["architecture"]}, as {CONFIG_FILE} describes it')
    if weights_path(folder).name != WEIGHTS_FILE:
        yield Check(None, f'{folder} has a pickled state dict, no {WEIGHTS_FILE}, which alone can hold digests')
        return
    try:
        with safe_open(folder / WEIGHTS_FILE, framework='pt') as file:
            metadata = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        bad = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    except Exception as e:  # safetensors' and torch's, for data types that they can't handle, such as F8_E4M3
        yield Check(False, (
            f'{folder / WEIGHTS_FILE} has tensors that can\'t be checked ({type(e).__name__}: {first_line(e)}): save '
            'them as float32'))
        return
    yield Check(not bad, f'NaN or Inf in {printable(bad[0])}' if bad else 'no NaN, no Inf')
    digests = {key: digest(value) for key, value in found.items()}
    try:
        recorded_digests = {**json.loads(metadata['digests'])}
    except (KeyError, TypeError, ValueError, RecursionError):
        yield Check(None, f'{WEIGHTS_FILE} has no digests of its tensors: convert the weights again to have them')
    else:
        yield _compare_digests(recorded_digests, digests, 'equal to their recorded digests')
    if 'source_sha256' in metadata:
        reason = PROVENANCES.get(metadata.get('provenance', ''))
        claim = f'the authors\' file: {reason}' if reason else 'not known to be the authors\' file'
        source = printable(f'{metadata.get("source")}, SHA-256 {metadata["source_sha256"]}', 400)
        yield Check(None, f'converted from {source}, {claim}')
    if checkpoint is not None:
        source_file = read_checkpoint(checkpoint)
        recorded = printable(metadata.get('source_sha256', 'none'))
        yield Check(
            recorded == source_file.sha256,
            f'SHA-256 of the source: {recorded} recorded, {source_file.sha256} of {os.fspath(checkpoint)}')
        compared = _compare_with(source_file, digests)
        if not compared.ok:  # of a file with averaged weights (EMA), too, the others may have been taken
            others = _compare_with(read_checkpoint(checkpoint, use_ema=False), digests)
            compared = others if others.ok else compared
        yield compared


def _compare_with(source: Checkpoint, digests: dict[str, str]) -> Check:
    wanted = {key: digest(value) for key, value in to_timm(source.state_dict).items()}
    return _compare_digests(wanted, digests, 'equal to the source\'s, bit for bit')


def _compare_digests(wanted: dict[str, str], found: dict[str, str], what: str) -> Check:
    changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    return Check(not changed, f'the {len(found)} tensors are {what}' if not changed else (
        f'{len(changed)} tensors are not {what}: {", ".join(map(printable, changed[:5]))}'))
