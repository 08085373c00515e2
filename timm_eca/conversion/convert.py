"""Writes the authors' checkpoints as folders for timm and the Hub."""
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from timm.models import create_model, get_pretrained_cfg

from timm_eca.conversion.card import render_card
from timm_eca.conversion.identify import Identity, describe, identify
from timm_eca.conversion.reader import Checkpoint, CheckpointError, read_checkpoint
from timm_eca.errors import printable
from timm_eca.weights.atomic import new_folder
from timm_eca.weights.digests import digest, make_metadata, save_weights
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, SHA256, TAG
from timm_eca.weights.store import weights_dir

__all__ = ['Conversion', 'Provenance', 'by_channel', 'convert', 'make_config']

_logger = logging.getLogger(__name__)

# Why a file is taken for the authors': its SHA-256 is known; this package downloaded it from their address; it records
# the accuracy that they report; the user vouches for it.
Provenance = Literal['sha256', 'downloaded', 'best_prec1', 'vouched']


class Conversion(NamedTuple):
    """What `convert` did."""
    folder: Path
    identity: Identity
    tag: str | None
    sha256: str  # of the source file
    tensors: int
    left_out: tuple[str, ...]  # what else the source held
    widened: tuple[str, ...]  # data types that were made float32, without loss
    part: str  # which entry of the file was read, and the prefixes that its keys lost, in words; may be empty
    provenance: Provenance | None  # why the file is taken for the authors', None if it is not


def convert(
        checkpoint: str | os.PathLike,
        output: str | os.PathLike | None = None,
        tag: str | None = None,
        force: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        progress: bool = False,
        provenance: Literal['downloaded', 'vouched'] | None = None,
        use_ema: bool = True,
) -> Conversion:
    """Writes a checkpoint of the authors' code as a folder that timm loads and the Hub takes.

    The folder has `model.safetensors`, `config.json` and the card, `README.md`. It is made beside its place, loaded
    again, compared with the source bit for bit, and only then put there.

    The authors' tag, accuracies and license go only to a file that is known to be theirs: by its SHA-256, because it
    was downloaded from their address, because it records the accuracy that they report, or because the user says so.

    Args:
        checkpoint: The file.
        output: The folder, by default `<model>.<tag>` in the weights directory, where `pretrained=True` looks first.
        tag: Name of the weights, by default `bangguwu_in1k` for the authors' files. Others need a tag or an output.
        force: Replace the folder if it is there.
        mean: Means of the input channels that the network was trained with, by default ImageNet's.
        std: Standard deviations of the same.
        progress: Show a progress bar on a terminal.
        provenance: How the caller knows that the file is the authors': it was `'downloaded'` from their address, or
            the user `'vouched'` for it.
        use_ema: Take the averaged weights (EMA) where the file has both.

    Raises:
        CheckpointError: The checkpoint can't be converted, or the folder can't be written.
    """
    source = Path(checkpoint)
    if output is not None and not os.fspath(output):
        raise CheckpointError('The output folder\'s name is empty: name one.')
    with tqdm(total=4, desc='reading', leave=False, disable=None if progress else True) as bar:
        content = read_checkpoint(source, use_ema)
        bar.update()
        bar.set_description('identifying')
        identity = identify(content.state_dict, source)
        known = None
        if mean is None and std is None:
            known = _find_provenance(source, content, identity, provenance)
        elif provenance == 'vouched':
            raise CheckpointError('--official goes without --mean and --std: the authors used those of ImageNet.')
        tag = _choose_tag(source, identity, tag, output, known)
        known = known if tag == TAG else None
        _logger.info('%s: SHA-256 %s, provenance %s', source, content.sha256, known)
        folder = weights_dir() / f'{identity.model}.{tag}' if output is None else Path(os.path.abspath(output))
        config = make_config(identity, tag, mean, std, known)
        bar.update()

        bar.set_description('writing')
        state_dict = _untie(to_timm(content.state_dict))
        digests = {key: digest(value) for key, value in state_dict.items()}
        origin = {'source': printable(source.name, 255), 'source_sha256': content.sha256}
        metadata = make_metadata(digests, **origin, **({'provenance': known} if known else {}))
        try:
            with new_folder(folder, force, {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}) as new:
                save_weights(state_dict, new / WEIGHTS_FILE, metadata)
                (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False) + '\n', encoding='utf-8')
                (new / CARD_FILE).write_text(render_card(identity.model, tag, config), encoding='utf-8')
                bar.update()
                bar.set_description('comparing')
                state_dict.clear()  # what is loaded for the comparison needs the room
                content.state_dict.clear()
                _compare(new, digests)
        except OSError as e:
            cure = ', or replace it with --force' if isinstance(e, FileExistsError) and not force else ''
            raise CheckpointError(
                f'{folder} can\'t be written ({e.strerror or e}): name another --output{cure}.') from None
        bar.update()
    return Conversion(
        folder, identity, tag, content.sha256, len(digests), content.left_out, content.widened, content.part, known)


def _untie(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, copied where several share memory, as safetensors wants them."""
    untied: dict[str, torch.Tensor] = {}
    seen = set()
    for key, value in state_dict.items():
        value = value.contiguous()
        memory = value.untyped_storage().data_ptr()
        untied[key] = value.clone() if memory in seen else value
        seen.add(memory)
    return untied


def _find_provenance(
        source: Path,
        content: Checkpoint,
        identity: Identity,
        given: Literal['downloaded', 'vouched'] | None,
) -> Provenance | None:
    """How a file is known to be the authors', or None if it isn't."""
    if not identity.published:
        if given:
            raise CheckpointError(
                f'{source} is not a checkpoint as the authors published it ({describe(identity)}): leave out '
                '--official and name the weights with --tag.')
        return None
    official, sha256 = OFFICIAL[identity.model], SHA256.get(identity.model)
    if sha256 is not None:
        if given and sha256 != content.sha256:
            raise CheckpointError(
                f'{source} is not the authors\' {official.file}: its SHA-256 is {content.sha256}, not {sha256}. '
                'Download it again, or leave out --official and name the weights with --tag.')
        return 'sha256' if sha256 == content.sha256 else None
    if given:
        return given
    claimed = content.best_prec1
    return 'best_prec1' if claimed is not None and abs(claimed - official.top1) <= 0.1 else None


def _choose_tag(
        source: Path,
        identity: Identity,
        tag: str | None,
        output: Any,
        provenance: Provenance | None,
) -> str | None:
    reason = f'{source} is not known to be a file of the authors\' ({describe(identity)})'
    vouch = ', or add --official if you know that it is theirs' if identity.published else ''
    if tag is None:
        if provenance is None and output is None:
            raise CheckpointError(f'{reason}: name the weights with --tag NAME or the folder with --output DIR{vouch}.')
        return None if provenance is None else TAG
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', tag):
        raise CheckpointError(f'{tag!r} can\'t be a tag: use letters, digits, "_", "-" and ".".')
    if tag == TAG and provenance is None:
        raise CheckpointError(f'{reason}, and {TAG} is the tag of those: choose another --tag{vouch}.')
    return tag


def make_config(
        identity: Identity,
        tag: str | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        provenance: Provenance | None = None,
) -> dict[str, Any]:
    """The `config.json` of a folder, as timm and transformers read it. `provenance` is for our own cards."""
    num_features = create_model(identity.model, num_classes=0, device='meta').num_features
    cfg = get_pretrained_cfg(identity.model, allow_unregistered=False)
    official = OFFICIAL.get(identity.model)
    model_args: dict[str, Any] = {'kernel_sizes': list(identity.kernel_sizes)}
    if identity.in_chans != 3:
        model_args['in_chans'] = identity.in_chans
    if identity.attn_layer != 'eca':
        model_args['attn_layer'] = identity.attn_layer

    published = tag == TAG
    pretrained_cfg = replace(
        cfg,
        architecture=None,
        hf_hub_id=None,
        tag=tag,
        license='mit' if published else None,
        origin_url=REPOSITORY if published else None,
        paper_name=PAPER_NAME,
        paper_ids=PAPER_ID,
        input_size=(identity.in_chans, *cfg.input_size[1:]),
        mean=by_channel(mean, cfg.mean, identity.in_chans),
        std=by_channel(std, cfg.std, identity.in_chans, positive=True),
        num_classes=identity.num_classes,
        description=f'{official.title if official else identity.model}, converted from the authors\' format',
    ).to_dict(remove_source=True)
    return {
        'architecture': identity.model,
        'num_classes': identity.num_classes,
        'num_features': num_features,
        'global_pool': 'avg',
        'model_args': model_args,
        'pretrained_cfg': pretrained_cfg,
        **({'provenance': provenance} if provenance else {}),
    }


def by_channel(
        values: Sequence[float] | None,
        default: Sequence[float],
        in_chans: int,
        positive: bool = False,
) -> tuple[float, ...]:
    """Means or standard deviations for each channel. Channels that are not RGB get the average of the default."""
    if values is None:
        return tuple(default) if len(default) == in_chans else (round(sum(default) / len(default), 4),) * in_chans
    if len(values) not in (1, in_chans) or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
        raise CheckpointError(
            f'Invalid {"--std" if positive else "--mean"} {tuple(values)}: give one {"positive " * positive}number, or '
            f'one for each of the {in_chans} input channels.')
    return tuple(values) * (in_chans if len(values) == 1 else 1)


def _compare(folder: Path, digests: Mapping[str, str]) -> None:
    """Loads a folder as a user does and compares all its tensors with the source's, by their digests."""
    try:
        check_folder(folder)
    except FolderError as e:
        raise CheckpointError(f'{e}: such a network can\'t be converted.') from None
    loaded = create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    for key, expected in digests.items():
        if key not in loaded or digest(loaded[key]) != expected:
            raise CheckpointError(f'{folder}: {key} came back with other bits than it was written with: try again.')
