"""`timm-eca evaluate`."""
import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset, default_collate

from timm_eca.analysis.evaluate import Evaluation, classify, match_classes, write_evaluation
from timm_eca.analysis.images import IMAGE_MODES, ImageError, to_mode
from timm_eca.analysis.predict import class_names
from timm_eca.commands.columns import print_columns
from timm_eca.commands.image_options import add_model_arguments, load, report_unreadable
from timm_eca.commands.writing import writing
from timm_eca.errors import first_line, printable
from timm_eca.finetune.data import open_sources

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Measures a model on images by class: top-1, top-5, loss, and the recall and precision of each class. The '
        'classes are matched by their names. A folder without splits is evaluated whole, with the images that a model '
        'may have been trained on. Files that can\'t be read are reported and left out, and the exit status is 1.')
    parser.add_argument('data', metavar='DATA', help='a folder of images by class or by split and class, or hfds/NAME')
    add_model_arguments(parser)
    parser.add_argument('--split', default='validation', help='split to evaluate on (default: validation)')
    parser.add_argument('--data-dir', metavar='DIR', help='root or cache of a named dataset')
    parser.add_argument('-j', '--workers', type=int, default=0, help='processes that read images (default: 0)')
    parser.add_argument('--output', metavar='DIR', help='folder for per_class.csv, confusion_matrix.csv and .png')
    parser.add_argument('--json', action='store_true', help='print JSON')


class _Readable(Dataset):
    """The examples of a dataset, preprocessed, with the model's number of their class; or why they can't be read."""

    def __init__(self, dataset: Any, transform: Any, mode: str, numbers: list[int]) -> None:
        self.dataset, self.transform, self.mode, self.numbers = dataset, transform, mode, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int] | tuple[Path, str]:
        try:
            image, target = self.dataset[index]
            return self.transform(to_mode(image, self.mode)), self.numbers[int(target)]
        except Exception as e:  # Pillow's readers raise many types for a damaged file
            samples = getattr(self.dataset, 'samples', None)
            return Path(samples[index][0] if samples else f'image {index}'), first_line(e, 200)


def run(args: argparse.Namespace) -> int:
    model = load(args)
    cfg = resolve_data_config({}, model=model)
    sources = open_sources(
        args.data, args.data_dir, args.split, args.split, in_chans=cfg['input_size'][0])
    if sources.class_names is None:
        raise ImageError(f'{args.data} doesn\'t name its classes: make a folder of it with a folder for each class.')
    numbers = match_classes(model, sources.class_names)
    examples = _Readable(
        sources.val or sources.train, create_transform(**cfg), IMAGE_MODES[cfg['input_size'][0]], numbers)
    loader: Any = DataLoader(examples, args.batch_size, num_workers=args.workers, collate_fn=list)
    unreadable: list[tuple[Path, str]] = []

    def batches() -> Any:
        for batch in tqdm(loader, leave=False, disable=None):
            unreadable.extend(row for row in batch if isinstance(row[0], Path))
            read = [row for row in batch if not isinstance(row[0], Path)]
            if read:
                yield default_collate(read)

    results = classify(model, batches())
    if not results:
        raise ImageError(f'{args.data} has no image that can be read: name a folder that has.')
    evaluation = Evaluation(results, class_names(model))
    _report(args, evaluation, set(numbers), len(unreadable))
    if args.output:
        with writing(args.output):
            written = write_evaluation(Path(args.output), evaluation)
        if not args.json:
            print(*written, sep='\n')
    return report_unreadable(unreadable)


def _report(args: argparse.Namespace, evaluation: Evaluation, present: set[int], unreadable: int) -> None:
    scores = [score for number, score in enumerate(evaluation.by_class()) if number in present]
    if args.json:
        print(json.dumps({
            'images': len(evaluation.results), 'unreadable': unreadable, **evaluation.metrics,
            'classes': [score._asdict() for score in scores]}, ensure_ascii=False, indent=2))
        return
    top5 = '' if evaluation.top5 is None else f', top-5 {evaluation.top5:.2f} %'
    print(f'{len(evaluation.results):,} images: top-1 {evaluation.top1:.2f} %{top5}, loss {evaluation.loss:.4f}')
    percent = partial('{:.1f}'.format)
    rows = [(printable(s.name), str(s.images), *('-' if v is None else percent(v) for v in s[2:])) for s in scores]
    if len(rows) <= 100:
        print_columns([('class', 'images', 'recall (%)', 'precision (%)'), *rows])
