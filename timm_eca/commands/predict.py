"""`timm-eca predict`."""
import argparse
import json
from pathlib import Path

from huggingface_hub.utils import tqdm

from timm_eca.analysis.images import find_images, read_images
from timm_eca.analysis.predict import class_names, predict
from timm_eca.commands.console import add_image_arguments, load, positive, report_unreadable
from timm_eca.errors import printable

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
    unreadable: list[tuple[Path, str]] = []
    progress = tqdm(total=len(paths), leave=False, disable=None if len(paths) > 1 else True)
    count = 0
    for prediction in predict(model, read_images(model, paths, args.batch_size, unreadable), args.topk):
        best = [
            {'class': index, 'name': names[index], 'probability': round(probability, 6)}
            for index, probability in zip(prediction.classes, prediction.probabilities)
        ]
        with progress.external_write_mode():
            if args.json:
                print('[' if count == 0 else ',')
                print(json.dumps({'image': str(prediction.path), 'predictions': best}), end='')
            else:
                print(prediction.path)
                for row in best:
                    print(f'  {row["probability"]:8.2%}  {printable(str(row["name"]), 200)}')
        count += 1
        progress.update()
    progress.close()
    if args.json:
        print('\n]' if count else '[]')
    return report_unreadable(unreadable)
