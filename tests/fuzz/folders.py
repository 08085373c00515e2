"""Feeds folders with a mutated config.json and a mutated model.safetensors to all that reads folders.

Each reader has to end with one sentence that names the folder, or with a model that has the tensors of the file. It may
write nothing.
"""
import copy
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies
from outcome import check_sentence
from timm.models import create_model, save_for_hf

import timm_eca  # noqa: F401 (registers the models)
from timm_eca.analysis.predict import load_model
from timm_eca.conversion.verify import verify
from timm_eca.errors import TimmEcaError
from timm_eca.weights.hub import push_folder

__all__ = ['FolderCase', 'check_folder_case', 'folder_cases']

MODEL = 'eca_test_resnet'
DEEP, REMOVE = 'deep', 'remove'  # stand for nested lists, which the json module does not write, and for no entry
VALUES: list[Any] = [
    REMOVE, None, True, False, 0, -1, 1, 3, 64, 4097, 2 ** 31, 2 ** 64, 10 ** 400, 0.5, -0.5, 1e308, float('nan'),
    float('inf'), '', 'text', 'eca', 'adaptive', '../../../etc/passwd', '\x1b[31m\n', '\ud800', 'x' * 20000, 'resnet18',
    'eca_resnet50', 'eca_test_resnet.r160_in1k', 'avgmax', 'fc', 'conv1.0', [], [1], [3, 3, 3, 3], [9999, 3, 3, 3],
    [3, 224, 224], [3, 10 ** 9, 10 ** 9], [0.5] * 3, [[[[[[1]]]]]], [0] * 5000, ['a', 'b'], [None] * 10, {}, {'a': 1},
    {'eca': {'kernel_size': 3}}, {str(n): 'x' for n in range(500)}, DEEP,
]
ARGUMENTS = [
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'checkpoint_path', 'cache_dir',
    'device', 'dtype', 'features_only', 'out_indices', 'kernel_sizes', 'attn', 'layers', 'channels', 'block',
    'act_layer', 'norm_layer', 'block_args', 'in_chans', 'num_classes', 'img_size', 'global_pool', 'drop_rate',
    'stem_width', 'base_width', 'cardinality', 'output_stride', 'scriptable',
]
PREPROCESSING = ['label_offset', 'custom_load', 'state_dict', 'file', 'url', 'hf_hub_id', 'source']


def _folder() -> tuple[dict[str, Any], bytes]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(
            create_model(MODEL, num_classes=3, kernel_sizes=3), folder, model_config={'label_names': ['a', 'b', 'c']},
            safe_serialization=True)
        root = Path(folder)
        return json.loads((root / 'config.json').read_text()), (root / 'model.safetensors').read_bytes()


def _read_header(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    length, = struct.unpack('<Q', weights[:8])
    return json.loads(weights[8:8 + length]), weights[8 + length:]


CONFIG, WEIGHTS = _folder()
TENSORS = sorted(_read_header(WEIGHTS)[0])
PLACES = [
    *((key,) for key in CONFIG), *(('model_args', key) for key in ARGUMENTS),
    *(('pretrained_cfg', key) for key in (*CONFIG['pretrained_cfg'], *PREPROCESSING))]


class FolderCase(NamedTuple):
    """A folder: the changes of its config, by their places, and of the header of its weights, by their kinds."""
    config: list[tuple[tuple[str, ...], Any]]
    header: list[tuple[str, str, Any]]


def folder_cases() -> strategies.SearchStrategy[FolderCase]:
    """All cases. Most change the config, one in three the header."""
    values = strategies.sampled_from(VALUES)
    kinds = strategies.sampled_from(['rename', 'remove', 'shape', 'dtype', 'metadata', 'add'])
    header = strategies.lists(strategies.tuples(kinds, strategies.sampled_from(TENSORS), values), max_size=2)
    return strategies.builds(
        FolderCase,
        config=strategies.lists(strategies.tuples(strategies.sampled_from(PLACES), values), max_size=2),
        header=strategies.integers(1, 3).flatmap(lambda n: header if n == 1 else strategies.just([])))


def _write_config(case: FolderCase) -> bytes:
    config = copy.deepcopy(CONFIG)
    for (*parents, key), value in case.config:
        part: Any = config
        for parent in parents:
            part = part.get(parent)
        if isinstance(part, dict) and value is not REMOVE:
            part[key] = copy.deepcopy(value)
        elif isinstance(part, dict):
            part.pop(key, None)
    return json.dumps(config).replace(f'"{DEEP}"', '[' * 50000 + ']' * 50000).encode()


def _write_weights(case: FolderCase) -> bytes:
    header, data = _read_header(WEIGHTS)
    for kind, name, value in case.header:
        entry = header.pop(name, None)
        if entry is None or kind == 'remove':
            continue
        header[f'{value}' if kind == 'rename' else name] = entry
        if kind in ('shape', 'dtype'):
            header[name] = {**entry, kind: value}
        elif kind == 'metadata':
            header['__metadata__'] = {'digests': '[' * 50000} if value is DEEP else {'source_sha256': f'{value}'}
        elif kind == 'add':
            header['extra'] = entry
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def check_folder_case(case: FolderCase) -> str:
    """Runs one case, and returns the outcome of loading: `read`, or the beginning of the sentence.

    Raises:
        AssertionError: A reader did something that it must not do.
    """
    with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, TIMM_ECA_HOME=home):
        root = Path(home) / f'{MODEL}.mine'
        root.mkdir()
        content = {
            'config.json': _write_config(case), 'model.safetensors': _write_weights(case), 'README.md': b'card'}
        for name, data in content.items():
            (root / name).write_bytes(data)
        outcomes = []
        for read in (
                lambda: load_model(str(root)),
                lambda: push_folder(root, 'a/b', dry_run=True),
                lambda: all(check.what.isprintable() for check in verify(root)) or 1 / 0):
            try:
                done = read()
            except TimmEcaError as e:
                outcomes.append(check_sentence(e, root.name))
                continue
            outcomes.append('read')
            if isinstance(done, torch.nn.Module) and not done.pretrained_cfg.get('label_offset'):
                header, _ = _read_header(content['model.safetensors'])
                shapes = {name: tuple(value['shape']) for name, value in header.items() if name != '__metadata__'}
                assert shapes == {
                    name: tuple(value.shape) for name, value in done.state_dict().items()
                    if name in shapes or not name.endswith('.num_batches_tracked')}
        assert {path.name: path.read_bytes() for path in root.iterdir()} == content
        assert os.listdir(home) == [root.name]
        return outcomes[0]
