"""`timm-eca export`."""
import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_eca.errors import TimmEcaError

if TYPE_CHECKING:
    import torch.nn as nn

__all__ = ['add_arguments', 'run']

# Prints nothing. It runs in a process of its own, and takes a folder, a file of images and the number of threads.
_CLASSIFY = """
import sys
sys.modules['timm_eca'] = None  # an import of it fails
import timm
import torch
folder, images, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
with torch.inference_mode():
    torch.save(model(torch.load(images, weights_only=True)), f'{images}.logits')
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Writes a model with ECA as a folder that timm loads without this package, e.g. as resnet50 with '
        "block_args={'attn_layer': 'eca'}. The logits stay equal, bit for bit. timm has such a form for residual "
        'networks with kernels that are not larger than the paper\'s formula gives.')
    parser.add_argument('folder', metavar='FOLDER', help='a folder that convert or finetune made')
    parser.add_argument('--output', metavar='DIR', required=True, help='the folder to make')
    parser.add_argument('--force', action='store_true', help='replace the folder if it is there')


def run(args: argparse.Namespace) -> int:
    from timm.models import create_model

    from timm_eca.models.timm_form import as_timm_model
    from timm_eca.weights.atomic import new_folder
    from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder

    source, output = Path(args.folder), Path(os.path.abspath(args.output))
    try:
        config = check_folder(source)
    except FolderError as e:
        raise TimmEcaError(str(e), 'name a folder that convert or finetune made') from e
    model = create_model(f'local-dir:{source}', pretrained=True).eval()
    stock: Any = as_timm_model(model)
    try:
        with new_folder(output, args.force, {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}) as new:
            _write(new, source, config, stock)
            _compare(new, model, output)
    except FileExistsError as e:
        raise TimmEcaError(str(e), 'name another --output, or replace it with --force') from e
    except OSError as e:
        raise TimmEcaError(f'{output} can\'t be written ({e.strerror or e})', 'name another --output') from e
    print(f'{output}: {stock.pretrained_cfg["architecture"]} with ECA, with the same logits, bit for bit')
    print(f'  use, without timm_eca: timm.create_model({f"local-dir:{output}"!r}, pretrained=True)')
    return 0


def _write(new: Path, source: Path, source_config: Mapping[str, Any], stock: Any) -> None:
    """Writes the weights, the config and the card."""
    import json
    from copy import deepcopy

    from huggingface_hub import ModelCard
    from safetensors import safe_open
    from timm.models import save_for_hf

    from timm_eca.weights.card import render_card
    from timm_eca.weights.digests import digest, file_sha256, make_metadata, save_weights
    from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
    from timm_eca.weights.official import PROVENANCES

    # transformers reads them beside the pretrained_cfg only.
    labels = {key: stock.pretrained_cfg.pop(key, None) for key in ('label_names', 'label_descriptions')}
    save_for_hf(stock, new, safe_serialization=True, model_config=labels)
    config = json.loads((new / CONFIG_FILE).read_text(encoding='utf-8'))
    config['model_args'].pop('num_classes', None)  # transformers gives it, too
    (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    origin: dict[str, str] = {}
    if (source / WEIGHTS_FILE).exists():
        with safe_open(source / WEIGHTS_FILE, framework='pt') as file:
            recorded = file.metadata() or {}
        origin = {key: recorded[key] for key in ('source', 'source_sha256', 'provenance') if key in recorded}
    (new / WEIGHTS_FILE).unlink()  # it has no digests, and is readable for its owner only
    tensors = stock.state_dict()
    digests = {key: digest(value) for key, value in tensors.items()}
    metadata = make_metadata(digests, config_sha256=file_sha256(new / CONFIG_FILE), **origin)
    save_weights(tensors, new / WEIGHTS_FILE, metadata)

    sentence = f'The weights were converted from {origin["source"]}, ' if 'source_sha256' in origin else ''
    if sentence:
        reason = PROVENANCES.get(origin.get('provenance', ''))
        sentence += f'the file of ECA-Net\'s authors: {reason}.' if reason else 'not known to be a file of the authors.'
        sentence += f' Its SHA-256 is {origin["source_sha256"]}.\n'
    card = render_card(
        f'{config["architecture"]} with ECA',
        config,
        deepcopy(stock).to('meta'),
        summary=f'Weights of `{source_config["architecture"]}` for timm\'s `{config["architecture"]}` with the '
                f'arguments `{config["model_args"]}`. No other package is needed.',
        classes=f'{config["num_classes"]:,}' if config['num_classes'] else 'none (a backbone)',
        sections={'Where the weights are from': (
            f'{sentence}`timm-eca export` renamed the tensors for timm, padded the ECA kernels with zeros to the sizes '
            'that timm makes,\nand compared the logits of some images with those of the source, bit for bit.')},
        data=ModelCard.load(source / CARD_FILE).data if (source / CARD_FILE).exists() else None,
        license=config['pretrained_cfg'].get('license'),
    )
    (new / CARD_FILE).write_text(card, encoding='utf-8')


def _compare(new: Path, model: 'nn.Module', output: Path) -> None:
    """Loads the folder in a process that can't import timm_eca, and compares its logits with the model's."""
    import subprocess
    import sys
    import tempfile

    import torch
    from timm.data import resolve_data_config

    from timm_eca.layers.norm_attn import named_norm_attn

    shape = resolve_data_config({}, model=model)['input_size']
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, 'images.pt')
        torch.save(images, path)
        subprocess.run(  # noqa: S603 (it runs this module's own code)
            [sys.executable, '-c', _CLASSIFY, str(new), path, str(torch.get_num_threads())], cwd=work, check=True)
        logits = torch.load(f'{path}.logits', weights_only=True)
    for _, place in named_norm_attn(model):  # the fused operation, which rounds in another way, skips norms with hooks
        place.norm.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        if not torch.equal(model(images), logits):
            raise TimmEcaError(f'{output}: timm alone computes other logits from it', 'report this with the folder')
