"""`timm-eca gates`."""
import argparse
from pathlib import Path

from huggingface_hub.utils import tqdm

from timm_eca.analysis.gates_report import collect_gates, draw_gates, write_gates
from timm_eca.analysis.images import ImageError, find_images
from timm_eca.analysis.predict import ModelError
from timm_eca.commands.columns import print_columns
from timm_eca.commands.image_options import add_image_arguments, load, report_unreadable
from timm_eca.commands.writing import writing

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Prints what the gates of each ECA layer are over images, and with --output writes them: gates.safetensors of '
        'each image, gates.csv and gates.png with the means over the images of each folder, as in the paper\'s figure '
        'of channel weights (the figure needs the extra plot).')
    add_image_arguments(parser)
    parser.add_argument('--output', metavar='DIR', help='folder for the files')


def run(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    model = load(args)
    unreadable: list[tuple[Path, str]] = []
    with tqdm(paths, leave=False, disable=None) as progress:
        try:
            collected, read = collect_gates(model, progress, unreadable, args.batch_size)
        except ValueError as e:
            raise ModelError(f'{args.model}: {e}') from None
    rows: list[tuple[str, ...]] = [('layer', 'channels', 'mean', 'lowest', 'highest', 'deviation between images')]
    for name, values in collected.items():
        spread = values.std(0, correction=0).mean()
        rows.append((name, str(values.shape[1]), *(f'{v:.4f}' for v in (
            values.mean(), values.mean(0).min(), values.mean(0).max(), spread))))
    if read:
        print_columns(rows)
    if args.output and read:
        with writing(args.output):
            for path in write_gates(Path(args.output), collected, read):
                print(path)
            try:
                print(draw_gates(Path(args.output) / 'gates.png', collected, read))
            except ImportError:
                raise ImageError(
                    'the figure needs matplotlib, the other files are written: pip install \'timm_eca[plot]\'.'
                ) from None
    return report_unreadable(unreadable)
