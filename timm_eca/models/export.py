"""Writes a model with ECA as a folder that timm loads without this package."""
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import ModelCard
from timm.data import resolve_data_config
from timm.models import create_model

from timm_eca.errors import TimmEcaError
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.models.timm_form import as_timm_model
from timm_eca.weights.atomic import new_folder
from timm_eca.weights.card import official_card, render_card
from timm_eca.weights.digests import read_metadata
from timm_eca.weights.key_maps import describe_kernel_sizes
from timm_eca.weights.model_folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FolderError, check_folder, write_model
from timm_eca.weights.official import PROVENANCES, TAG

__all__ = ['export_folder']

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


def export_folder(source: Path, output: Path, force: bool = False) -> str:
    """Writes the model of a folder in timm's own form (`as_timm_model`).

    The new folder is made beside its place. timm loads it in a process that can't import this package, and must
    compute the same logits, bit for bit. Only then the folder moves to its place.

    Args:
        source: A folder that `convert` or `finetune` made.
        output: The folder to make.
        force: Replace the folder if it exists.

    Returns:
        The name of timm's model.

    Raises:
        ModelError: timm has no such model.
        TimmEcaError: The source is no folder of a model, or the output can't be written.
    """
    output = Path(os.path.abspath(output))
    other = 'name another --output'
    if output.resolve() == Path(source).resolve():
        raise TimmEcaError(f'{output} is the folder to export itself', other)
    try:
        config = check_folder(source)
    except FolderError as e:
        raise TimmEcaError(e.problem, 'name a folder that convert or finetune made') from e
    model = create_model(f'local-dir:{source}', pretrained=True).eval()
    stock = as_timm_model(model)
    try:
        with new_folder(output, force, {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}) as new:
            exported = _write(new, source, config, model, stock)
            _compare(new, model, output)
    except FileExistsError as e:
        raise TimmEcaError(str(e), other if force else f'{other}, or replace it with --force') from e
    except OSError as e:
        raise TimmEcaError(f'{output} can\'t be written ({e.strerror or e})', other) from e
    return exported


def _write(new: Path, source: Path, source_config: Mapping[str, Any], model: nn.Module, stock: Any) -> str:
    """Writes the weights, the config and the card. Returns the name of timm's model."""
    # transformers finds them only beside the pretrained_cfg.
    labels = {key: stock.pretrained_cfg.pop(key, None) for key in ('label_names', 'label_descriptions')}
    origin: dict[str, str] = {}
    if (source / WEIGHTS_FILE).exists():
        recorded = read_metadata(source / WEIGHTS_FILE)
        origin = {key: recorded[key] for key in ('source', 'source_sha256', 'provenance') if key in recorded}
    kernel_sizes = describe_kernel_sizes(model.state_dict())
    config = write_model(new, stock, {'kernel_sizes': kernel_sizes, **origin}, model_config=labels)
    (new / CARD_FILE).write_text(_make_card(source, source_config, config, stock, origin), encoding='utf-8')
    return config['architecture']


def _make_card(
        source: Path,
        source_config: Mapping[str, Any],
        config: Mapping[str, Any],
        stock: Any,
        origin: Mapping[str, str],
) -> str:
    reason = PROVENANCES.get(origin.get('provenance', ''))
    if reason and config['pretrained_cfg'].get('tag') == TAG:
        return official_card(f'{source_config["architecture"]}.{TAG}', origin['provenance'], needs_plugin=False)
    warning = source_file = ''
    if 'source_sha256' in origin:
        warning = 'These weights are not known to be those of ECA-Net\'s authors.\n'
        source_file = f'They were converted from {origin["source"]}. Its SHA-256 is {origin["source_sha256"]}.\n'
    return render_card(
        f'{config["architecture"]} with ECA',
        config,
        stock,
        summary=f'{warning}Weights of `{source_config["architecture"]}` for timm\'s `{config["architecture"]}` with '
                f'the arguments `{config["model_args"]}`. No other package is needed.',
        classes=f'{config["num_classes"]:,}' if config['num_classes'] else 'none (a backbone)',
        sections={'Where the weights are from': (
            f'{source_file}`timm-eca export` renamed the tensors for timm, padded the ECA kernels with zeros to the '
            'sizes that timm makes,\nand compared the logits of some images with those of the source, bit for bit.')},
        data=ModelCard.load(source / CARD_FILE).data if (source / CARD_FILE).exists() else None,
        license=config['pretrained_cfg'].get('license'),
    )


def _compare(new: Path, model: nn.Module, output: Path) -> None:
    """Loads the folder in a process that can't import timm_eca, and compares its logits with the model's."""
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
