"""All of the authors' checkpoints at once: what is there, what is to be converted, what is to be downloaded."""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from timm_eca.conversion.identify import describe, identify
from timm_eca.conversion.reader import CheckpointError, read_checkpoint
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.model_folder import WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL, TAG
from timm_eca.weights.store import find_local_weights, weights_dir

__all__ = ['Step', 'plan_all']


class Step(NamedTuple):
    """One of the published models, on its way to the weights directory."""
    model: str
    name: str  # `<model>.<tag>`
    folder: Path  # in the weights directory
    checkpoint: Path | None  # the file to convert; None if it is to be downloaded
    done: bool  # the folder is there already


def plan_all(checkpoints: Sequence[str | os.PathLike] = (), force: bool = False) -> list[Step]:
    """What is to be done so that all published models are in the weights directory. Nothing is written.

    A model that is there already counts as done, if no file is given for it or it was converted from this very file.

    Args:
        checkpoints: Files of the authors, in any order. The models without one are to be downloaded.
        force: Nothing counts as done.

    Raises:
        CheckpointError: A file is none of the authors', two are of the same model, or the folder of a model was
            converted from another file.
        WeightsNotFoundError: A folder in the weights directory is damaged.
    """
    folders = {model: None if force else find_local_weights(f'{model}.{TAG}') for model in OFFICIAL}
    sources = {_source_sha256(folder): model for model, folder in folders.items() if folder}
    given: dict[str, Path] = {}
    for path in map(Path, checkpoints):
        model = sources.get(file_sha256(path)) if path.is_file() else None
        if model is None:
            identity = identify(read_checkpoint(path).state_dict, path)
            model = identity.model
            if not identity.published:
                raise CheckpointError(f'{path} is not a checkpoint that the authors published ({describe(identity)}).')
            if folders[model]:
                raise CheckpointError(
                    f'{folders[model]} was converted from another file than {path}: replace it with --force.')
        if model in given:
            raise CheckpointError(f'{given[model]} and {path} are both of {model}: name one of them.')
        given[model] = path
    return [
        Step(model, f'{model}.{TAG}', weights_dir() / f'{model}.{TAG}', given.get(model), bool(folder))
        for model, folder in folders.items()
    ]


def _source_sha256(folder: Path) -> str | None:
    """The SHA-256 of the file that a folder was converted from, as its weights say it."""
    with safe_open(folder / WEIGHTS_FILE, framework='pt') as file:
        return (file.metadata() or {}).get('source_sha256')
