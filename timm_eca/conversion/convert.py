"""Writes the authors' checkpoints as folders for timm and the Hub."""
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.models import create_model, get_pretrained_cfg

from timm_eca.conversion.identify import Identity, identify
from timm_eca.conversion.reader import Checkpoint, CheckpointError, read_checkpoint
from timm_eca.errors import printable
from timm_eca.images.channels import by_channel
from timm_eca.weights.atomic import new_folder
from timm_eca.weights.card import converted_card, official_card
from timm_eca.weights.digests import digest, file_sha256, make_metadata, save_weights
from timm_eca.weights.key_maps import to_timm
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.weights.store import weights_dir

__all__ = ['Conversion', 'check_tag', 'convert']


class Conversion(NamedTuple):
    """The result of `convert`."""
    folder: Path
    identity: Identity
    tag: str | None
    provenance: str | None  # why the file counts as the authors', a key of `PROVENANCES`; None if it does not
    tensors: int  # their number
    checkpoint: Checkpoint  # without its tensors


def convert(
        checkpoint: str | os.PathLike | Checkpoint,
        output: str | os.PathLike | None = None,
        tag: str | None = None,
        force: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        provenance: Literal['downloaded', 'vouched'] | None = None,
        use_ema: bool = True,
) -> Conversion:
    """Writes a checkpoint of the authors' code as a folder that timm loads and the Hub takes.

    The folder has `model.safetensors`, `config.json` and the card, `README.md`. It is made beside its place, loaded
    again, compared with the source bit for bit, and only then moved to its place.

    The authors' tag, accuracies and license go only to a file that is known to be theirs: because it was downloaded
    from their address, because it records the accuracy that they report, or because the user vouches for it.

    Args:
        checkpoint: The file, or its content from `read_checkpoint`.
        output: The folder, by default `<model>.<tag>` in the weights directory, where `pretrained=True` looks first.
        tag: Name of the weights, by default `bangguwu_in1k` for the authors' files. Others need a tag or an output.
        force: Replace the folder if it exists.
        mean: Means of the input channels in training, by default ImageNet's; `std` likewise.
        provenance: How the caller knows that the file is the authors'.
        use_ema: Take the averaged weights (EMA) if the file has both.

    Raises:
        CheckpointError: The checkpoint can't be converted, or the folder can't be written.
    """
    check_tag(tag)
    content = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint, use_ema)
    source = content.path
    if source.name == WEIGHTS_FILE and _is_model_folder(source.parent):
        folder = source.parent
        raise CheckpointError(
            f'{source} is in a model folder already, which needs no conversion', f'use the folder: --model {folder}',
            f'make a folder for timm alone: timm-eca export {folder} --output DIR',
            f'publish it: timm-eca push {folder} ORGANISATION/NAME')
    identity = identify(content.state_dict, source)
    imagenet = mean is None and std is None
    if provenance == 'vouched' and not imagenet:
        raise CheckpointError(
            f'{source} can\'t have --official with --mean or --std, as the authors\' networks take ImageNet\'s',
            'leave out --mean and --std')
    if provenance and not identity.published:
        raise CheckpointError(
            f'{source} is not a checkpoint as the authors published it ({identity})',
            'leave out --official, and name the weights with --tag')
    known: str | None = None
    if identity.published and imagenet:
        recorded = abs((content.best_prec1 or 0) - OFFICIAL[identity.model].top1) <= 0.1
        known = provenance or ('best_prec1' if recorded else None)
    if tag is None and (known or output is None):
        tag = TAG
    if tag == TAG and not known:
        vouch = ', or add --official if you know that it is theirs' if identity.published else ''
        raise CheckpointError(
            f'{source} is not known to be a file of the authors ({identity}), and {TAG} is the tag of their files',
            f'name the weights with --tag NAME or the folder with --output DIR{vouch}')
    known = known if tag == TAG else None

    name = f'{identity.model}.{tag}' if tag else identity.model
    folder = weights_dir() / name if output is None else Path(os.path.abspath(output))
    network = create_model(
        identity.model, num_classes=identity.num_classes, in_chans=identity.in_chans,
        kernel_sizes=identity.kernel_sizes, attn_layer=identity.attn_layer, device='meta')
    config = _make_config(identity, network.num_features, tag, mean, std)
    card = official_card(name, known) if known else converted_card(name, config, network)
    # Copies, since safetensors takes no tensors that share memory.
    state_dict = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in to_timm(content.state_dict).items()}
    digests = {key: digest(value) for key, value in state_dict.items()}
    origin = {'source': printable(source.name, 255), 'source_sha256': content.sha256}
    if known:
        origin['provenance'] = known
    try:
        with new_folder(folder, force, {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}) as new:
            (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False) + '\n', encoding='utf-8')
            (new / CARD_FILE).write_text(card, encoding='utf-8')
            metadata = make_metadata(digests, config_sha256=file_sha256(new / CONFIG_FILE), **origin)
            save_weights(state_dict, new / WEIGHTS_FILE, metadata)
            try:
                loaded = create_model(f'local-dir:{new}', pretrained=True).state_dict()
            except RuntimeError as e:  # one tensor by two names, for example
                reason = printable(' '.join(str(e).split()), 300)
                raise CheckpointError(
                    f'{source} can\'t be converted ({reason})', 'convert an unmodified checkpoint') from e
            changed = [key for key, value in digests.items() if digest(loaded[key]) != value]
            if changed:
                raise CheckpointError(f'{source}: {changed[0]} was read with other bits than were written', 'try again')
    except OSError as e:
        hint = ', or replace it with --force' if isinstance(e, FileExistsError) and not force else ''
        raise CheckpointError(
            f'{folder} can\'t be written ({e.strerror or e})', f'name another --output{hint}') from e
    return Conversion(folder, identity, tag, known, len(digests), content._replace(state_dict={}))


def check_tag(tag: str | None) -> None:
    """Raises a CheckpointError for a tag that no folder can have."""
    if tag is not None and not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', tag):
        raise CheckpointError(f'{tag!r} can\'t be a tag', 'use letters, digits, "_", "-" and "."')


def _is_model_folder(folder: Path) -> bool:
    try:
        check_folder(folder)
    except FolderError:
        return False
    return True


def _make_config(
        identity: Identity,
        num_features: int,
        tag: str | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
) -> dict[str, Any]:
    """The `config.json` of a folder, as timm and transformers read it."""
    cfg = get_pretrained_cfg(identity.model, allow_unregistered=False)
    model_args: dict[str, Any] = {'kernel_sizes': list(identity.kernel_sizes)}
    if identity.in_chans != 3:
        model_args['in_chans'] = identity.in_chans
    if identity.attn_layer != 'eca':
        model_args['attn_layer'] = identity.attn_layer
    official = OFFICIAL.get(identity.model)
    pretrained_cfg = replace(
        cfg,
        architecture=None,
        hf_hub_id=None,
        tag=tag,
        license='mit' if tag == TAG else None,
        origin_url=REPOSITORY if tag == TAG else None,
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
    }
