"""Reads the authors' checkpoints, finds out what they are, and writes them as folders for timm and the Hub.

A checkpoint is known by its tensors alone: neither its file name nor the `arch` that it carries is trusted.
"""
import json
import math
import os
import pickle
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from timm.models import create_model, get_pretrained_cfg, list_models

from timm_eca.archive import ArchiveError, check_archive
from timm_eca.card import render_card
from timm_eca.errors import TimmEcaError, show
from timm_eca.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder, regular_size
from timm_eca.key_maps import GATE, kernel_sizes_by_stage
from timm_eca.key_maps import to_official as to_official
from timm_eca.key_maps import to_timm as to_timm
from timm_eca.new_folder import new_folder
from timm_eca.official import OFFICIAL, OFFICIAL_MODULES, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.pretrained import weights_dir
from timm_eca.provenance import digest, file_sha256, make_metadata, save_weights

__all__ = [
    'Checkpoint', 'CheckpointError', 'Conversion', 'Identity', 'convert', 'describe', 'identify', 'make_config',
    'read_checkpoint', 'to_official', 'to_timm',
]

_LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # what torch.save wrote first before it wrote zip files


class CheckpointError(TimmEcaError, ValueError):
    """A checkpoint that can't be converted, or an output that can't be written; says what to do about it."""


class Identity(NamedTuple):
    """What a state dict is."""
    model: str  # name of the registered model
    kernel_sizes: tuple[int, ...]  # by stage
    num_classes: int  # 0 where there is no classifier
    in_chans: int

    @property
    def published(self) -> bool:
        """Whether its shapes are those of the checkpoint that the authors published for this model."""
        official = OFFICIAL.get(self.model)
        return official is not None and self[1:] == (official.kernel_sizes, 1000, 3)


class Conversion(NamedTuple):
    """What `convert` did."""
    folder: Path
    identity: Identity
    tag: str | None
    sha256: str  # of the source file
    tensors: int
    left_out: tuple[str, ...]  # what else the source held
    widened: tuple[str, ...]  # data types that were made float32, without loss


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""
    state_dict: dict[str, torch.Tensor]  # by official keys, without `module.` or `backbone.`; float32
    sha256: str  # of the file
    left_out: tuple[str, ...]
    widened: tuple[str, ...]


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads the tensors of a checkpoint file, running no code from it.

    It may be of any form that `torch.save` has written: legacy or zip, with tensors on a GPU, a bare state dict or one
    below `state_dict`, with keys below `module.` (DataParallel) and `backbone.` (mmdetection). float16 and bfloat16
    tensors are widened to float32, which loses nothing; float64 is refused, since narrowing it would.

    Raises:
        CheckpointError: It is no such file, or holds something else than finite floating point tensors.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            regular_size(path)
        with path.open('rb') as file:
            _refuse_other_formats(path, file)
            sha256 = file_sha256(path)
            file.seek(0)
            content = _load(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        if os.path.isdir(path):
            raise CheckpointError(f'{path} is a directory: name the checkpoint file in it.') from None
        raise CheckpointError(f'{path} can\'t be read ({e.strerror or e}): name an existing checkpoint file.') from None

    tensors, left_out = _unwrap(path, content)
    del content  # the optimizer's state is as large as the weights
    state_dict, widened = {}, set()
    for key, value in tensors.items():
        state_dict[key] = _check_tensor(path, key, value)
        size -= value.nbytes
        if size < 0:  # separate copies of them would take memory without a bound
            raise CheckpointError(f'{path}: its tensors share memory, they are larger than the file: save copies.')
        if state_dict[key].dtype != value.dtype:
            widened.add(str(value.dtype).removeprefix('torch.'))
    return Checkpoint(state_dict, sha256, left_out, tuple(sorted(widened)))


def _refuse_other_formats(path: Path, file: IO[bytes]) -> None:
    head = file.read(512)
    again = 'download the checkpoint again'
    if not head:
        raise CheckpointError(f'{path} is empty: {again}.')
    if head.startswith(_LEGACY_MAGIC):
        return _check(path)
    if _LEGACY_MAGIC.startswith(head):
        raise CheckpointError(f'{path} is cut off after {len(head)} bytes: {again}.')
    if re.match(rb'\s*<(!doctype|html|\?xml|head|body)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint, as Google Drive sends one in place of a file when it asks for a '
            f'confirmation or its quota is used up: {again}, e.g. in a browser.')
    if head.startswith(b'PK\x03\x04'):
        return _check(path)
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive. The authors\' .pth.tar files are none, in spite of their name: name the '
            'checkpoint as it was downloaded, or unpack this archive and name the checkpoint in it.')
    raise CheckpointError(f'{path} is not a file that torch.save wrote: name one of the authors\' .pth.tar files.')


def _check(path: Path) -> None:
    try:
        check_archive(path)
    except ArchiveError as e:
        cure = 'download the checkpoint again' if 'damaged' in str(e) else 'name a checkpoint as torch.save wrote it'
        raise CheckpointError(f'{path} is {e}: {cure}.') from None


def _load(path: Path, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = re.search(r'GLOBAL (\S+)', str(e))
        if unsafe:
            raise CheckpointError(
                f'{path} holds more than tensors and plain values: loading it would run {show(unsafe[1])}, so it was '
                'refused. If you trust its source, save its state_dict alone, where it was made, and convert that.'
            ) from None
        error: Exception = e
    except Exception as e:  # whatever a damaged file makes the reader stumble over
        error = e
    raise CheckpointError(
        f'{path} is cut off or damaged after its beginning (it has {path.stat().st_size} bytes; '
        f'{type(error).__name__}): download the checkpoint again.'
    ) from None


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors of a checkpoint without the prefixes of their keys, and the names of what else it holds."""
    wrapped = isinstance(content, Mapping) and isinstance(content.get('state_dict'), Mapping)
    state_dict = content['state_dict'] if wrapped else content
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f'{path} holds a {type(content).__name__}, not a state dict: save model.state_dict() and convert that.')
    if not state_dict:
        raise CheckpointError(f'{path} holds an empty state dict: name a checkpoint with weights.')
    for key in state_dict:  # names are shown as they are from here on
        if not isinstance(key, str):
            raise CheckpointError(
                f'{path} has a key that is no string ({type(key).__name__}) where tensors are named: it is not a '
                'state dict, save model.state_dict() and convert that.')
    left_out = [show(str(key)) for key in content if key != 'state_dict'] if wrapped else []

    if any(key.startswith('module.') for key in state_dict):  # DataParallel
        stranger = next((key for key in state_dict if not key.startswith('module.')), None)
        if stranger is not None:
            raise CheckpointError(
                f'{path} has {show(stranger)!r} beside keys that start with \'module.\': it is not one network, save '
                'the state_dict of one and convert that.')
        state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if any(key.startswith('backbone.') for key in state_dict):  # mmdetection, with the rest of the detector beside it
        others = {key.partition('.')[0] for key in state_dict} - {'backbone'}
        left_out += [f'{show(other)}.*' for other in sorted(others)]
        state_dict = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
    if len(left_out) > 9:
        left_out = [*left_out[:9], f'{len(left_out) - 9} more']
    return dict(state_dict), tuple(left_out)


def _check_tensor(path: Path, key: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f'{path}: {show(key)!r} is a {type(value).__name__} and no tensor: save model.state_dict(), convert that.')
    value = value.detach()
    if key.endswith('.num_batches_tracked'):
        dense = value.layout == torch.strided and value.device.type == 'cpu'
        if dense and value.dtype == torch.int64 and value.dim() == 0:
            return value
        raise CheckpointError(f'{path}: {show(key)!r} is not a count (one int64 number): convert an undamaged copy.')
    if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
        raise CheckpointError(
            f'{path}: {show(key)!r} is a sparse, quantized or empty (meta) tensor: save the weights as dense float32 '
            'tensors.')
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f'{path}: {show(key)!r} is larger than its data: save the weights as dense tensors.')
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if value.dtype != torch.float32:
        raise CheckpointError(
            f'{path}: {show(key)!r} is of {value.dtype}: save the weights as float32 (float16 and bfloat16 are '
            'widened, float64 is not narrowed silently).')
    if not value.isfinite().all():
        raise CheckpointError(f'{path}: {show(key)!r} has NaN or Inf in it: convert an undamaged copy.')
    if key.endswith('.running_var') and value.lt(0).any():
        raise CheckpointError(f'{path}: {show(key)!r} has negative variances in it: convert an undamaged copy.')
    return value


@cache
def _architectures() -> dict[str, dict[str, torch.Size]]:
    """The tensors' shapes of each registered model, with ECA kernels of size 1."""
    names = list_models(module=list(OFFICIAL_MODULES))
    models = {name: create_model(name, kernel_sizes=1, device='meta') for name in names}
    return {name: {key: value.shape for key, value in model.state_dict().items()} for name, model in models.items()}


def identify(state_dict: Mapping[str, torch.Tensor]) -> Identity:
    """Finds out which registered model a state dict is of, from the names and shapes of its tensors.

    Args:
        state_dict: Tensors by the official keys or timm's, without `module.`.

    Raises:
        CheckpointError: It is of none, or its kernel sizes are not odd and the same within each stage.
    """
    state_dict = to_timm(state_dict)
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    if not any(key.endswith(GATE) for key in shapes):
        known = {key for expected in _architectures().values() for key in expected}
        foreign = next((key for key in shapes if key not in known), None)
        what = f'it has {show(foreign)!r}' if foreign else 'it has the tensors of a plain network'
        raise CheckpointError(
            f'This is not an ECA network: {what}, and no tensor that ends in {GATE}. Only checkpoints of ECA-Net '
            'can be converted.')

    model = _closest_architecture(shapes)
    cfg = get_pretrained_cfg(model, allow_unregistered=False)
    classifier = (f'{cfg.classifier}.weight', f'{cfg.classifier}.bias')
    in_chans = shapes[f'{cfg.first_conv}.weight'][1]
    num_classes = shapes[classifier[0]][0] if classifier[0] in shapes else 0
    return Identity(model, _find_kernel_sizes(state_dict), num_classes, in_chans)


def _closest_architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    differences = {name: _difference(name, expected, shapes) for name, expected in _architectures().items()}
    model = min(differences, key=lambda name: len(differences[name]))
    difference = differences[model]
    if not difference:
        return model
    if all('shape' in line for line in difference) and model.startswith('eca_mobilenetv2') and len(difference) > 9:
        raise CheckpointError(
            'This is an ECA-MobileNetV2 of another width. The official code rounds widths down to any integer and timm '
            'to multiples of 8, so only width 1.0 is the same network in both; others can\'t be converted.')
    listed = '; '.join(difference[:3]) + (f'; and {len(difference) - 3} more' if len(difference) > 3 else '')
    raise CheckpointError(
        f'This is not a whole ECA network as the authors\' code makes it. The closest is {model}, but: {listed}. '
        'Convert an unmodified, complete checkpoint.')


def _difference(name: str, expected: Mapping[str, torch.Size], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being those of an architecture, whatever its kernels, input channels and classes are."""
    cfg = get_pretrained_cfg(name, allow_unregistered=False)
    weight, bias = f'{cfg.classifier}.weight', f'{cfg.classifier}.bias'
    if weight not in shapes and bias not in shapes:  # a backbone
        expected = {key: shape for key, shape in expected.items() if key not in (weight, bias)}
    difference = [f'{key} is missing' for key in expected if key not in shapes]
    difference += [f'{show(key)} is not known' for key in shapes if key not in expected]
    for key in expected.keys() & shapes.keys():
        shape, wanted = shapes[key], tuple(expected[key])
        free = {f'{cfg.first_conv}.weight': 1, weight: 0, bias: 0}.get(key, 2 if key.endswith(GATE) else None)
        if free is not None and len(shape) == len(wanted) and shape[free] > 0:
            wanted = (*wanted[:free], shape[free], *wanted[free + 1:])
        if shape != wanted:
            difference.append(f'{key} has shape {list(shape)[:8]}, not {list(wanted)}')
    if not difference and weight in shapes and shapes[weight][0] != shapes[bias][0]:
        difference.append(f'{weight} has shape {list(shapes[weight])} and {bias} {list(shapes[bias])}')
    return sorted(difference)


def _find_kernel_sizes(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    stages = kernel_sizes_by_stage(state_dict)
    for stage, sizes in stages.items():
        if len(sizes) > 1 or sizes[0] % 2 == 0:
            raise CheckpointError(
                f'The ECA kernel sizes of {stage} are {", ".join(map(str, sizes))[:80]}: in an ECA network all blocks '
                'of a stage have the same, odd size. Convert an unmodified checkpoint.')
    return tuple(sizes[0] for sizes in stages.values())


def convert(
        checkpoint: str | os.PathLike,
        output: str | os.PathLike | None = None,
        tag: str | None = None,
        force: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        progress: bool = False,
) -> Conversion:
    """Writes a checkpoint of the authors' code as a folder that timm loads and the Hub takes.

    The folder has `model.safetensors`, `config.json` and the card, `README.md`. It is made beside its place, loaded
    again, compared with the source bit for bit, and only then put there.

    Args:
        checkpoint: The file.
        output: The folder, by default `<model>.<tag>` in the weights directory, where `pretrained=True` looks first.
        tag: Name of the weights. By default that of the authors' weights where the shapes are theirs; for others
            either a tag or an output is needed.
        force: Replace the folder if it is there.
        mean: Means of the input channels that the network was trained with, by default ImageNet's.
        std: Standard deviations of the same.
        progress: Show a progress bar on a terminal.

    Raises:
        CheckpointError: The checkpoint can't be converted, or the folder can't be written.
    """
    source = Path(checkpoint)
    if output is not None and not os.fspath(output):
        raise CheckpointError('The output folder\'s name is empty: name one.')
    with tqdm(total=4, desc='reading', leave=False, disable=None if progress else True) as bar:
        content = read_checkpoint(source)
        bar.update()
        bar.set_description('identifying')
        try:
            identity = identify(content.state_dict)
        except CheckpointError as e:
            raise CheckpointError(f'{source}: {e}') from None
        own_statistics = mean is not None or std is not None
        tag = _choose_tag(source, identity, tag, output, own_statistics)
        folder = weights_dir() / f'{identity.model}.{tag}' if output is None else Path(os.path.abspath(output))
        config = make_config(identity, tag, mean, std)
        bar.update()

        bar.set_description('writing')
        state_dict = _untie(to_timm(content.state_dict))
        digests = {key: digest(value) for key, value in content.state_dict.items()}
        renamed: dict[str, Any] = to_timm(cast(Any, digests))  # and counts that the source lacks
        metadata = make_metadata(
            {key: value if isinstance(value, str) else digest(value) for key, value in renamed.items()},
            source=show(source.name, 255), source_sha256=content.sha256)
        with _new_folder(folder, force) as new:
            try:
                save_weights(state_dict, new / WEIGHTS_FILE, metadata)
            except SafetensorError as e:
                raise CheckpointError(f'{folder} can\'t be written ({e}): name another --output.') from None
            (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False) + '\n', encoding='utf-8')
            (new / CARD_FILE).write_text(render_card(identity.model, tag, config), encoding='utf-8')
            (new / WEIGHTS_FILE).chmod((new / CONFIG_FILE).stat().st_mode)  # safetensors keeps it from other users
            bar.update()
            bar.set_description('comparing')
            state_dict.clear()  # what is loaded for the comparison needs the room
            content.state_dict.clear()
            _compare(new, digests)
        bar.update()
    return Conversion(
        folder, identity, tag, content.sha256, len(digests), content.left_out, content.widened)


def _untie(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, copied where two are the same memory, as safetensors wants them."""
    untied: dict[str, torch.Tensor] = {}
    seen = set()
    for key, value in state_dict.items():
        value = value.contiguous()
        untied[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return untied


def _choose_tag(source: Path, identity: Identity, tag: str | None, output: Any, own_statistics: bool) -> str | None:
    published = identity.published and not own_statistics
    if tag is None:
        if published:
            return TAG
        if output is None:
            raise CheckpointError(
                f'{source} is not a checkpoint as the authors published it ({describe(identity)}): give it a name '
                'with --tag NAME, or a folder with --output DIR.')
        return None
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', tag):
        raise CheckpointError(f'{tag!r} can\'t be a tag: use letters, digits, "_", "-" and ".".')
    if tag == TAG and not published:
        raise CheckpointError(
            f'{source} is not a checkpoint as the authors published it ({describe(identity)}), and {TAG} is the tag '
            'of theirs: choose another --tag.')
    return tag


def describe(identity: Identity) -> str:
    """An identity in words."""
    sizes = ', '.join(map(str, identity.kernel_sizes))
    classes = f'{identity.num_classes} classes' if identity.num_classes else 'no classifier'
    return f'{identity.model}, kernel sizes {sizes}, {classes}, {identity.in_chans} input channels'


def make_config(
        identity: Identity,
        tag: str | None,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
) -> dict[str, Any]:
    """The `config.json` of a folder, as timm and transformers read it."""
    model = create_model(
        identity.model, kernel_sizes=identity.kernel_sizes, num_classes=identity.num_classes,
        in_chans=identity.in_chans, device='meta')
    cfg = get_pretrained_cfg(identity.model, allow_unregistered=False)
    official = OFFICIAL.get(identity.model)
    model_args: dict[str, Any] = {'kernel_sizes': list(identity.kernel_sizes)}
    if identity.in_chans != 3:
        model_args['in_chans'] = identity.in_chans

    def statistics(values: Iterable[float] | None, default: Sequence[float]) -> tuple[float, ...]:
        given = tuple(default if values is None else values)
        if not all(map(math.isfinite, given)):
            raise CheckpointError(f'Means and deviations of the input channels must be numbers, not {given}.')
        if len(given) not in (1, identity.in_chans):  # unknown channels: the default's average for each
            if values is not None:
                raise CheckpointError(f'{identity.in_chans} input channels need as many means and deviations, or one.')
            given = (round(sum(given) / len(given), 4),)
        return given * (identity.in_chans if len(given) == 1 else 1)

    if std is not None and min(std, default=0) <= 0:
        raise CheckpointError(f'Standard deviations of the input channels must be positive, not {std}.')
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
        mean=statistics(mean, cfg.mean),
        std=statistics(std, cfg.std),
        num_classes=identity.num_classes,
        description=f'{official.title if official else identity.model}, converted from the authors\' format',
    ).to_dict(remove_source=True)
    return {
        'architecture': identity.model,
        'num_classes': identity.num_classes,
        'num_features': model.num_features,
        'global_pool': 'avg',
        'model_args': model_args,
        'pretrained_cfg': pretrained_cfg,
    }


@contextmanager
def _new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A folder to write in that takes its place when all went well, with the errors of a conversion."""
    try:
        with new_folder(folder, force, {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}) as new:
            yield new
    except FileExistsError as e:
        if e.errno is None:
            cure = 'so --force does not replace it: name another --output' if force else (
                'name another --output, or replace it with --force')
            raise CheckpointError(f'{e}{", " if force else ": "}{cure}.') from None
        raise CheckpointError(f'{folder} can\'t be written ({e.strerror}): name another --output.') from None
    except OSError as e:
        raise CheckpointError(
            f'{folder} can\'t be written ({e.strerror or e}): make room or name another --output.') from None


def _compare(folder: Path, digests: Mapping[str, str]) -> None:
    """Loads a folder as a user does and compares all its tensors with the source's, by their digests."""
    try:
        check_folder(folder)
    except FolderError as e:
        raise CheckpointError(f'{e}: such a network can\'t be converted.') from None
    loaded = to_official(create_model(f'local-dir:{folder}', pretrained=True).state_dict())
    for key, expected in digests.items():
        if key not in loaded or digest(loaded[key]) != expected:
            raise CheckpointError(f'{folder}: {key} came back with other bits than it was written with: try again.')
