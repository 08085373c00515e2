"""Accuracy of a model after PT2E quantization to int8 (torchao, x86), with ECA and without.

    python tests/benchmarks/int8_accuracy.py CHECKPOINT PHOTOGRAPHS [--mean 0.5 0.5 0.5] [--std 0.5 0.5 0.5]

CHECKPOINT is a file in the authors' format with constant channel weights: `remove_eca` makes the model without ECA from
it. PHOTOGRAPHS has a folder for each WordNet id. A fifth of the photographs calibrates the ranges of the activations;
the other photographs are classified.
"""
import argparse
import tempfile
from copy import deepcopy
from pathlib import Path

import timm
import torch
import torch.nn as nn
from measure import machine
from timm.data import ImageNetInfo
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer, get_default_x86_inductor_quantization_config,
)

from timm_eca import remove_eca
from timm_eca.images.batches import read_images
from timm_eca.images.files import find_images
from timm_eca.conversion.convert import convert


def quantize(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """An int8 model: ranges of the weights by channel, ranges of the activations from the images."""
    batch = torch.export.Dim('batch', min=2, max=1024)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for part in images.split(10):
        prepared(part)
    return convert_pt2e(prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint')
    parser.add_argument('photographs')
    parser.add_argument('--mean', type=float, nargs='+')
    parser.add_argument('--std', type=float, nargs='+')
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        done = convert(args.checkpoint, Path(folder) / 'model', mean=args.mean, std=args.std)
        model = timm.create_model(f'local-dir:{done.folder}', pretrained=True).eval()
    paths = find_images([args.photographs])
    images = torch.cat([pixels for pixels, _ in read_images(model, paths, 50, [])])
    info = ImageNetInfo()
    index = {info.index_to_label_name(i): i for i in range(1000)}
    labels = torch.tensor([index[path.parent.name] for path in paths])
    tested = torch.arange(len(paths)) % 5 != 0

    print(machine())
    print(f'{int(tested.sum())} photographs, {int((~tested).sum())} others to calibrate')
    print('| model | float32: right | int8: right | same first class | relative error of the logits |')
    print('|---|---|---|---|---|')
    with torch.no_grad():
        for name, network in (('with ECA', model), ('without', remove_eca(deepcopy(model)))):
            int8 = quantize(network, images[~tested])
            wanted, found = (torch.cat([n(part) for part in images[tested].split(20)]) for n in (network, int8))
            right = [int((logits.argmax(1) == labels[tested]).sum()) for logits in (wanted, found)]
            same = int((wanted.argmax(1) == found.argmax(1)).sum())
            error = float((found - wanted).norm() / wanted.norm())
            print(f'| {name} | {right[0]} | {right[1]} | {same} | {error:.3f} |')


if __name__ == '__main__':
    main()
