"""From a file of the authors to a model of timm, and back."""
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.official_files import ENTRIES, golden, golden_input, official_state_dict, recipe_tensor, save_official
from safetensors import safe_open

from timm_eca.conversion.convert import convert
from timm_eca.conversion.identify import identify
from timm_eca.conversion.reader import Checkpoint, CheckpointError, read_checkpoint
from timm_eca.weights.digests import file_sha256
from timm_eca.weights.key_maps import to_official, to_timm
from timm_eca.weights.official import OFFICIAL, OFFICIAL_MODULES, TAG


@pytest.mark.parametrize('name', [
    name if name in ('eca_resnet18_k3577', 'eca_mobilenetv2_k13') else
    pytest.param(name, marks=pytest.mark.slow) for name in ENTRIES])
def test_whole_way_gives_the_official_logits(name: str, tmp_path: Path, home: Path):
    """Official keys -> a file in the official format -> convert -> create_model: what the official code computes."""
    model, kernel_sizes = ENTRIES[name]
    logits, keys = golden(name)
    shapes = to_official(timm.create_model(model, kernel_sizes=kernel_sizes, device='meta').state_dict())
    assert list(shapes) == keys
    source = {key: recipe_tensor(key, tuple(shapes[key].shape)) for key in keys}
    file = save_official(tmp_path / f'{name}.pth.tar', source)

    published = OFFICIAL[model].file == file.name  # whose best_prec1 says so
    output = None if published else tmp_path / 'other'
    done = convert(file, output)
    assert done.folder == (home / f'{model}.{TAG}' if published else output)
    assert done.identity == (model, kernel_sizes, 1000, 3, 'eca')
    assert done.tag == (TAG if published else None)

    loaded = timm.create_model(model if published else f'local-dir:{output}', pretrained=True).eval()
    with torch.inference_mode():
        assert (loaded(golden_input()) - logits).abs().max() <= 1e-4 * logits.abs().max()

    back = to_official(loaded.state_dict())
    assert list(back) == keys
    assert all(torch.equal(back[key], source[key]) for key in keys)


@pytest.mark.slow
def test_real_weights_predict_real_photographs(shared: Path, home: Path):
    """Plain MobileNetV2 weights in the official layout, every gate 0.5, against the official code's predictions."""
    from PIL import Image

    file = shared / 'data' / 'eca_mobilenetv2_zero_gate.pth.tar'
    convert(file, tag='zero_gate', mean=[0.5], std=[0.5])
    model = timm.create_model('eca_mobilenetv2.zero_gate', pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config['mean'] == [0.5] * 3
    transform = timm.data.create_transform(**config, is_training=False)
    with (shared / 'golden' / 'sample_predictions.csv').open() as golden_file:
        wanted = {row['wnid']: row for row in csv.DictReader(golden_file)}
    assert len(wanted) == 100

    right = 0
    with torch.inference_mode():
        for wnid, row in wanted.items():
            path = shared / 'data' / 'imagenet-sample' / wnid / f'{wnid}.jpg'
            logits = model(transform(Image.open(path).convert('RGB')).unsqueeze(0))[0]
            assert logits.argmax() == int(row['top1']), wnid
            assert logits.topk(5).indices.tolist() == [int(index) for index in row['top5'].split()], wnid
            assert float(logits.max()) == pytest.approx(float(row['top1_logit']), abs=2e-3)
            right += row['top1'] == row['label']
    assert right == 74
    source = read_checkpoint(file).state_dict
    back = to_official(model.state_dict())
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


@pytest.mark.parametrize('model', [
    pytest.param(model, marks=pytest.mark.slow) if model in ('eca_resnet101', 'eca_resnet152') else model
    for model in timm.list_models(module=list(OFFICIAL_MODULES))])
def test_each_model_is_told_from_the_others(model: str):
    """By the names of timm and of the authors, which map to each other."""
    named = timm.create_model(model, num_classes=7, device='meta').state_dict()
    official = to_official(named)
    back = to_timm(official)
    assert list(back) == list(named)
    assert all(back[key] is value for key, value in named.items())
    for state_dict in (named, official):
        identity = identify(state_dict)
        assert (identity.model, *identity[2:]) == (model, 7, 3, 'eca')


@pytest.mark.parametrize('kwargs', [{'num_classes': 5}, {'in_chans': 1}, {'kernel_sizes': 3}, {}])
def test_other_shapes_are_not_published(kwargs: dict):
    network = timm.create_model('eca_mobilenetv2', device='meta', **kwargs)
    assert identify(network.state_dict()).published == (not kwargs)


def test_detection_checkpoint_becomes_a_backbone(tmp_path: Path):
    """mmdetection's format: the network is below `backbone.`, without a classifier, beside a neck and heads."""
    source = official_state_dict('eca_resnet18', kernel_sizes=(5, 5, 5, 5), num_classes=0)
    content = {f'backbone.{key}': value for key, value in source.items()}
    content |= {'neck.lateral_convs.0.conv.weight': torch.ones(2), 'bbox_head.fc.weight': torch.ones(2)}
    path = tmp_path / 'faster_rcnn.pth'
    torch.save({'meta': {'epoch': 12, 'CLASSES': ('person', 'car')}, 'state_dict': content}, path)
    done = convert(path, tag='coco')
    assert done.identity == ('eca_resnet18', (5, 5, 5, 5), 0, 3, 'eca')
    assert done.checkpoint.left_out == ('meta', 'bbox_head.*', 'neck.*')

    features = timm.create_model('eca_resnet18.coco', pretrained=True, features_only=True)
    loaded = to_official(features.state_dict())
    assert all(torch.equal(loaded[key], source[key]) for key in source)
    assert [tuple(f.shape[1:]) for f in features(torch.zeros(1, 3, 64, 64))][-1] == (512, 2, 2)
    with pytest.raises(RuntimeError, match=r'fc\.weight'):  # a classifier that the weights do not have
        timm.create_model('eca_resnet18.coco', pretrained=True, num_classes=1000, pretrained_cfg_overlay={
            'num_classes': 1000})


def test_other_shapes(tmp_path: Path):
    """Of classes, channels and kernels. The registered name and the folder give the same model."""
    kwargs = {'in_chans': 4, 'num_classes': 5, 'kernel_sizes': (3,) * 7}
    path = save_official(tmp_path / 'fine_tuned.pth.tar', official_state_dict('eca_mobilenetv2_050', **kwargs))
    done = convert(path, tag='mine')
    loaded = timm.create_model('eca_mobilenetv2_050.mine', pretrained=True).eval()
    by_folder = timm.create_model(f'local-dir:{done.folder}', pretrained=True).eval()
    expected = timm.create_model('eca_mobilenetv2_050', device='meta', **kwargs)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()}
    x = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), by_folder(x))
    assert len(timm.data.resolve_model_data_config(loaded)['mean']) == 4


@pytest.fixture(scope='module')
def content(mobilenetv2_file: Path) -> Checkpoint:
    """The content of a file with the shapes of the authors', which records no accuracy."""
    return read_checkpoint(mobilenetv2_file)._replace(best_prec1=None)


def _claims(folder: Path) -> tuple[object, ...]:
    """What a folder says of where its weights are from: tag, license, provenance, and whether it has accuracies."""
    config = json.loads((folder / 'config.json').read_text())
    with safe_open(folder / 'model.safetensors', framework='pt') as file:
        provenance = file.metadata().get('provenance')
    cfg = config['pretrained_cfg']
    reports = 'The authors report' in (folder / 'README.md').read_text()
    return cfg.get('tag'), cfg.get('license'), provenance, reports


@pytest.mark.parametrize(('recorded', 'provenance', 'expected'), [
    (72.4, None, None),
    (72.64, None, 'best_prec1'),
    (None, 'downloaded', 'downloaded'),
    (None, 'vouched', 'vouched'),
])
def test_who_is_taken_for_the_authors(
        recorded: float | None, provenance: Any, expected: str | None, content: Checkpoint, tmp_path: Path):
    """Shapes prove nothing: a random network of the right shapes gets neither their tag nor license nor accuracy."""
    content = content._replace(best_prec1=recorded)
    done = convert(content, tmp_path / 'folder', provenance=provenance)
    assert done.provenance == expected
    assert _claims(done.folder) == ((TAG, 'mit', expected, True) if expected else (None, None, None, False))
    assert content.state_dict  # the caller's own


def test_who_is_not_taken_for_the_authors(content: Checkpoint, checkpoint: Path, tmp_path: Path):
    """Without a name, or with the authors' tag, such weights are refused."""
    for source, arguments, match in (
            (content, {}, r'not known to be a file of the authors.*--tag NAME.*--official'),
            (content, {'tag': TAG}, r'not known to be a file of the authors.*--tag NAME.*--official'),
            (content, {'provenance': 'vouched', 'std': [0.5]}, 'leave out --mean and --std'),
            (content, {'provenance': 'downloaded', 'mean': [0.5]}, '--tag NAME'),
            (checkpoint, {}, '--tag NAME'), (checkpoint, {'tag': TAG}, '--tag NAME'),
            (checkpoint, {'provenance': 'vouched'}, 'leave out --official')):
        with pytest.raises(CheckpointError, match=match):
            convert(source, **arguments)
    done = convert(content, tmp_path / 'other', tag='other', provenance='downloaded', mean=[0.5])
    assert _claims(done.folder) == ('other', None, None, False)


def test_folder_of_the_authors_file(mobilenetv2_file: Path, home: Path):
    """The three files and what is in them, made with four models at most. They stay until force replaces them."""
    calls = []
    created = timm.create_model.__code__
    sys.setprofile(lambda frame, event, arg: calls.append(1) if event == 'call' and frame.f_code is created else None)
    try:
        done = convert(mobilenetv2_file)
    finally:
        sys.setprofile(None)
    assert 1 <= len(calls) <= 4

    assert sorted(path.name for path in done.folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    with safe_open(done.folder / 'model.safetensors', framework='pt') as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(timm.create_model('eca_mobilenetv2', device='meta').state_dict())
    assert metadata['format'] == 'pt'
    assert metadata['source'] == 'eca_mobilenetv2_k13.pth.tar'
    assert metadata['source_sha256'] == done.checkpoint.sha256 == file_sha256(mobilenetv2_file)
    assert metadata['config_sha256'] == file_sha256(done.folder / 'config.json')
    assert {'tool', 'tool_version'} <= metadata.keys()
    config = json.loads((done.folder / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('eca_mobilenetv2', 1000)
    assert config['model_args'] == {'kernel_sizes': [1, 1, 1, 1, 3, 3, 3]}
    cfg = config['pretrained_cfg']
    assert (cfg['tag'], cfg['license'], cfg['paper_ids']) == (TAG, 'mit', 'arXiv:1910.03151')
    assert cfg['origin_url'] == 'https://github.com/BangguWu/ECANet'
    assert (cfg['crop_pct'], cfg['interpolation'], cfg['input_size']) == (0.875, 'bilinear', [3, 224, 224])

    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    with pytest.raises(CheckpointError, match='--force'):
        convert(mobilenetv2_file)
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} == before
    convert(mobilenetv2_file, force=True)
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} != before
    assert [path.name for path in home.iterdir()] == [done.folder.name]


def test_failed_comparison_leaves_nothing(checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """A writer that flips one bit is found out. No folder is left, and an older one stays."""
    import timm_eca.conversion.convert as module
    save_weights = module.save_weights

    def flip(tensors: dict[str, torch.Tensor], *args) -> None:
        weight = tensors['conv_head.weight'].clone()
        weight.view(torch.int32).view(-1)[5] ^= 1
        save_weights({**tensors, 'conv_head.weight': weight}, *args)

    before = convert(checkpoint, tag='mine').folder / 'model.safetensors'
    digest = file_sha256(before)
    monkeypatch.setattr(module, 'save_weights', flip)
    for tag in ('mine', 'other'):
        with pytest.raises(CheckpointError, match=r'conv_head\.weight was read with other bits'):
            convert(checkpoint, tag=tag, force=True)
    assert file_sha256(before) == digest
    assert [path.name for path in home.iterdir()] == ['eca_mobilenetv2_050.mine']


def test_key_maps_are_plain_and_leave_their_input_alone():
    source = official_state_dict('eca_mobilenetv2')
    keys = list(source)
    mapped = to_timm(source)
    assert type(mapped) is dict
    assert list(source) == keys
    assert mapped['blocks.1.0.conv_dw.weight'] is source['features.2.conv.1.0.weight']
    assert mapped['blocks.0.0.bn2.attn.conv.weight'] is source['features.1.conv.3.conv.weight']
    assert to_timm(mapped) == mapped
    assert all(value is source[key] for key, value in to_official(mapped).items())


def test_plain_mobilenetv2_of_torchvision():
    """Its names, nested and as they were before: the same modules without ECA."""
    official = {key: value for key, value in official_state_dict('eca_mobilenetv2').items() if value.dim() != 3}
    places = {'0.0': '0', '0.1': '1', '1.0': '3', '1.1': '4', '2': '6', '3': '7'}
    first = {'0.0': '0', '0.1': '1', '1': '3', '2': '4'}
    flat = {}
    for key, value in official.items():
        module, _, tensor = key.rpartition('.')
        block, _, layer = module.partition('.conv.')
        if layer:
            module = f'{block}.conv.{(first if block == "features.1" else places)[layer]}'
        flat[f'{module}.{tensor}'] = value
    plain = timm.create_model('mobilenetv2_100')
    for names in (official, flat):
        mapped = to_timm(names)
        assert list(mapped) == list(plain.state_dict())
        plain.load_state_dict(mapped)


def test_authors_file_can_be_named_directly(mobilenetv2_file: Path, content: Checkpoint):
    """timm's own loader takes the file, and the filter brings the keys and checks them."""
    overlay = {'file': str(mobilenetv2_file)}
    model = timm.create_model('eca_mobilenetv2', pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = to_official(model.state_dict())
    assert all(torch.equal(value, content.state_dict[key]) for key, value in loaded.items())
    with pytest.raises(ValueError, match=r'kernel_sizes=\[1, 1, 1, 1, 3, 3, 3\]'):
        timm.create_model('eca_mobilenetv2', pretrained=True, pretrained_cfg_overlay=overlay, kernel_sizes=3)


def test_golden_figures_are_the_shared_ones(shared: Path):
    with np.load(shared / 'golden' / 'official_logits.npz') as file:
        for name in ENTRIES:
            assert np.array_equal(file[name], golden(name)[0].numpy())
