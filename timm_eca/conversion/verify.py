"""Checks the weights and the config of a folder: with the recorded digests, and with the converted file."""
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from timm_eca.conversion.reader import Checkpoint, read_checkpoint
from timm_eca.errors import printable
from timm_eca.weights.digests import digest, file_sha256
from timm_eca.weights.key_maps import cut_kernels, to_timm
from timm_eca.weights.model_folder import CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder, weights_path
from timm_eca.weights.official import PROVENANCES

__all__ = ['Check', 'verify']

# safetensors' names of the data types that every supported torch can compare and check for NaN
_DTYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'I16', 'I8', 'U8', 'BOOL')


class Check(NamedTuple):
    """The result of one comparison."""
    ok: bool | None  # None where there is nothing to compare with
    what: str


def verify(folder: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> Iterator[Check]:
    """Checks a folder that `convert` or `finetune` made, one thing after the other.

    The digests of the tensors and of `config.json` are in the weights file. Whoever changes the file can also change
    its digests. To rule that out, use `checkpoint`, or compare the SHA-256 of the weights with one from a source that
    you trust.

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
        yield Check(False, e.problem)
        return
    yield Check(True, f'the tensors are those of {config["architecture"]}, as {CONFIG_FILE} describes it')
    weights = weights_path(folder)
    yield Check(None, f'SHA-256 of {weights.name}: {file_sha256(weights)}')
    if weights.name != WEIGHTS_FILE:
        yield Check(None, f'{folder} has a pickled state dict. Only {WEIGHTS_FILE} can hold digests')
        return
    with safe_open(weights, framework='pt') as file:
        metadata = file.metadata() or {}
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no dict)
        unknown = next((key for key, dtype in dtypes.items() if dtype not in _DTYPES), None)
        if unknown is not None:
            yield Check(False, (
                f'{weights} has {printable(unknown)!r} of type {dtypes[unknown]}, which can\'t be checked: save it as '
                'float32'))
            return
        found = {key: file.get_tensor(key) for key in dtypes}
    bad = [key for key, value in found.items() if not value.isfinite().all()]
    yield Check(not bad, f'NaN or Inf in {printable(bad[0])}' if bad else 'no NaN, no Inf')
    try:
        recorded = {**json.loads(metadata['digests']), CONFIG_FILE: metadata['config_sha256']}
    except (KeyError, TypeError, ValueError, RecursionError):
        yield Check(None, (
            f'{WEIGHTS_FILE} has no digests of its tensors and of {CONFIG_FILE}: convert the weights again to have '
            'them'))
    else:
        digests = {**_digests(found), CONFIG_FILE: file_sha256(folder / CONFIG_FILE)}
        yield _compare(recorded, digests, f'the tensors and {CONFIG_FILE}', 'their recorded digests')
    if 'source_sha256' in metadata:
        reason = PROVENANCES.get(metadata.get('provenance', ''))
        claim = f'the authors\' file: {reason}' if reason else 'not known to be the authors\' file'
        source = printable(f'{metadata.get("source")}, SHA-256 {metadata["source_sha256"]}', 400)
        yield Check(None, f'converted from {source}, {claim}')
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        sha256 = printable(metadata.get('source_sha256', 'none'))
        yield Check(
            sha256 == content.sha256,
            f'SHA-256 of the source: {sha256} recorded, {content.sha256} of {os.fspath(checkpoint)}')
        check = _compare_with(content, found)
        if not check.ok:  # the folder may be of the last weights, not of their average (EMA)
            last = _compare_with(read_checkpoint(checkpoint, use_ema=False), found)
            check = last if last.ok else check
        yield check


def _compare_with(source: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> Check:
    wanted = to_timm(source.state_dict)
    found = cut_kernels(to_timm(tensors), wanted)  # timm's own form has other names, and kernels padded with zeros
    return _compare(_digests(wanted), _digests(found), f'the {len(found)} tensors', 'the source\'s, bit for bit')


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {key: digest(value) for key, value in tensors.items()}


def _compare(wanted: Mapping[str, str], found: Mapping[str, str], what: str, reference: str) -> Check:
    changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if not changed:
        return Check(True, f'{what} are equal to {reference}')
    more = f' and {len(changed) - 5} more' if len(changed) > 5 else ''
    return Check(False, f'not equal to {reference}: {", ".join(map(printable, changed[:5]))}{more}')
