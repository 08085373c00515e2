"""`timm-eca evaluate`."""
import argparse
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_eca.commands.console import (
    add_model_arguments, needing, not_negative, print_columns, report_progress, report_unreadable, writing,
)
from timm_eca.errors import printable

if TYPE_CHECKING:
    from timm_eca.analysis.evaluate import Evaluation

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Measures a model on images of known classes: top-1, top-5, loss, and the recall and precision of each class. '
        'The folders of DATA have the names of these classes. If DATA has no folder for the split, all images count, '
        'also those that the model was trained on. Reports files that can\'t be read, leaves them out, and ends '
        'with exit status 1.')
    parser.add_argument(
        'data', metavar='DATA', help='a folder of images by class or by split and class, hfds/NAME, or digits')
    add_model_arguments(parser)
    parser.add_argument('--split', metavar='NAME', help='split to evaluate on (default: the one to validate on)')
    parser.add_argument('--dataset-cache', metavar='DIR', help='cache for a dataset from the Hub')
    parser.add_argument('-j', '--workers', type=not_negative, default=0, help='processes that read images (default: 0)')
    parser.add_argument('--output', metavar='DIR', help='folder for tables of classes and confusions, and a figure')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    import torch
    from timm.data import resolve_data_config

    from timm_eca.analysis.evaluate import Evaluation, classify, match_classes, write_evaluation
    from timm_eca.analysis.predict import class_names
    from timm_eca.commands.load import load
    from timm_eca.images.batches import read_batches
    from timm_eca.images.reader import ImageError
    from timm_eca.images.sources import open_split

    model = load(args)
    channels = resolve_data_config({}, model=model)['input_size'][0]
    with needing('sklearn'):
        sources = open_split(args.data, args.dataset_cache, args.split, in_chans=channels)
    for note in sources.notes:
        print(f'Warning: {note}', file=sys.stderr)
    numbers = torch.tensor(match_classes(model, sources.class_names))
    unreadable: list[str] = []

    def batches() -> Iterator[tuple[Any, Any]]:
        read = read_batches(model, sources.train, args.batch_size, unreadable, args.workers)
        for pixels, labels in report_progress(read, len(sources.train)):
            yield pixels, numbers[labels]

    results = classify(model, batches())
    if not results:
        raise ImageError(f'{args.data} has no image that can be read', 'name a folder with images')
    evaluation = Evaluation(results, class_names(model))
    _report(args, evaluation, set(numbers.tolist()), len(unreadable))
    if args.output:
        with writing(args.output):
            written = write_evaluation(Path(args.output), evaluation)
        if not args.json:
            print(*written, sep='\n')
    return report_unreadable(unreadable)


def _report(args: argparse.Namespace, evaluation: 'Evaluation', present: Collection[int], unreadable: int) -> None:
    metrics, count = evaluation.metrics, len(evaluation.results)
    scores = [score for number, score in enumerate(evaluation.by_class()) if number in present]
    if args.json:
        print(json.dumps({
            'images': count, 'unreadable': unreadable, **metrics, 'classes': [score._asdict() for score in scores],
        }, ensure_ascii=False, indent=2))
        return
    print(f'{count:,} images: {evaluation.accuracy}, loss {metrics["loss"]:.4f}')
    if len(scores) <= 100:
        print_columns([('class', 'images', 'recall (%)', 'precision (%)'), *(
            (printable(s.name), str(s.images), *('-' if v is None else f'{v:.1f}' for v in (s.recall, s.precision)))
            for s in scores)])
