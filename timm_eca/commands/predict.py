"""`timm-eca predict`."""
import argparse
import json
from pathlib import Path
from typing import Any

from timm_eca.commands.console import add_image_arguments, positive, report_unreadable, writing
from timm_eca.errors import printable

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Prints the most probable classes of images. Reports files that can\'t be read, leaves them out, and ends '
        'with exit status 1.')
    add_image_arguments(parser)
    parser.add_argument('--topk', type=positive, default=5, metavar='N', help='classes of each image (default: 5)')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--results-file', metavar='FILE', help='also write the results to a file, .csv or .json')


def run(args: argparse.Namespace) -> int:
    from huggingface_hub.utils import tqdm

    from timm_eca.analysis.predict import class_names, predict
    from timm_eca.analysis.tables import write_csv
    from timm_eca.commands.load import load
    from timm_eca.images.batches import read_images
    from timm_eca.images.files import find_images
    from timm_eca.weights.atomic import atomic_write

    file = Path(args.results_file) if args.results_file else None
    if file and (file.suffix not in ('.csv', '.json') or not file.parent.is_dir()):
        args.parser.error(f'--results-file {file}: name a .csv or a .json file in a folder that exists')
    paths = find_images(args.images)
    model = load(args)
    names = class_names(model)
    unreadable: list[str] = []
    results: list[dict[str, Any]] = []
    for path, best in predict(model, read_images(model, paths, args.batch_size, unreadable), args.topk):
        found = [{'class': i, 'name': names[i], 'probability': round(value, 6)} for i, value in best]
        if args.json or file:
            results.append({'image': str(path), 'predictions': found})
        if not args.json:
            lines = [f'  {value:8.2%}  {printable(str(names[i]), 200)}' for i, value in best]
            tqdm.write('\n'.join([str(path), *lines]))  # as print does, beside the progress bar
    text = json.dumps(results, indent=2)
    if args.json:
        print(text)
    if file:
        with writing(args.results_file):
            if file.suffix == '.json':
                atomic_write(file, lambda new: new.write_text(text + '\n', encoding='utf-8'))
            else:
                write_csv(file, _table(results))
    return report_unreadable(unreadable)


def _table(results: list[dict[str, Any]]) -> list[list[Any]]:
    """A row for each image, with timm's names of the columns: filename, index_0, label_0, prob_0, ..."""
    count = max((len(result['predictions']) for result in results), default=0)
    header = [f'{column}_{i}' for i in range(count) for column in ('index', 'label', 'prob')]
    return [['filename', *header], *(
        [result['image'], *(value for best in result['predictions'] for value in best.values())] for result in results)]
