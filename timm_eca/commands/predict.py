"""`timm-eca predict`."""
import argparse
import json
from typing import Any

from huggingface_hub.utils import tqdm

from timm_eca.analysis.predict import class_names, predict
from timm_eca.commands.console import add_image_arguments, load, positive, report_unreadable
from timm_eca.errors import printable
from timm_eca.images.batches import read_images
from timm_eca.images.files import find_images

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Prints the most probable classes of images. Files that can\'t be read are reported and left out, and the exit '
        'status is 1.')
    add_image_arguments(parser)
    parser.add_argument('--topk', type=positive, default=5, help='classes of each image (default: 5)')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    model = load(args)
    names = class_names(model)
    unreadable: list[str] = []
    rows: list[dict[str, Any]] = []
    for path, best in predict(model, read_images(model, paths, args.batch_size, unreadable), args.topk):
        if args.json:
            found = [{'class': i, 'name': names[i], 'probability': round(value, 6)} for i, value in best]
            rows.append({'image': str(path), 'predictions': found})
        else:
            lines = [f'  {value:8.2%}  {printable(str(names[i]), 200)}' for i, value in best]
            tqdm.write('\n'.join([str(path), *lines]))  # as print does, beside the progress bar
    if args.json:
        print(json.dumps(rows, indent=2))
    return report_unreadable(unreadable)
