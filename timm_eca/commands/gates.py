"""`timm-eca gates`."""
import argparse
from pathlib import Path

from timm_eca.commands.console import (
    add_image_arguments, print_columns, report_progress, report_unreadable, writing,
)

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Prints the range of the channel weights (gates) of each ECA layer for images. With --output, it also writes '
        'gates.safetensors (the channel weights of each image), gates.csv (the means over the images of each folder) '
        'and a figure of these means, as in the paper. The figure needs the extra plot.')
    add_image_arguments(parser)
    parser.add_argument('--output', metavar='DIR', help='folder for the files')
    parser.add_argument(
        '--layers', nargs='+', metavar='LAYER',
        help='ECA layers, modules that contain them, or patterns such as "layer[34].*" (default: all layers; in the '
        'figure, the last layer of each stage)')
    parser.add_argument('--sort', action='store_true', help='sort the channels in the figure by their mean weight')
    parser.add_argument('--format', choices=['png', 'pdf', 'svg'], default='png', help='of the figure (default: png)')


def run(args: argparse.Namespace) -> int:
    from timm_eca.analysis.figures import draw_gates
    from timm_eca.analysis.gates_report import collect_gates, describe_gates, deviation, last_of_stages, write_gates
    from timm_eca.commands.load import load
    from timm_eca.errors import ModelError
    from timm_eca.images.batches import read_images
    from timm_eca.images.files import find_images

    paths = find_images(args.images)
    model = load(args)
    unreadable: list[str] = []
    batches = report_progress(read_images(model, paths, args.batch_size, unreadable), len(paths))
    try:
        collected, read = collect_gates(model, batches, args.layers)
    except ValueError as e:
        raise ModelError(f'{args.model}: {e}', 'name a model or layers with ECA') from e
    rows: list[tuple[str, ...]] = [('layer', 'channels', 'mean', 'lowest', 'highest', 'deviation between images')]
    for name, values in collected.items():
        rows.append((name, str(values.shape[1]), *(
            f'{v:.4f}' for v in (values.mean(), values.min(), values.max(), deviation(values)))))
    if read:
        print_columns(rows)
        print(f'Channel weights: {describe_gates(collected)}')
    if args.output and read:
        figure = Path(args.output) / f'gates.{args.format}'
        with writing(args.output):
            print(*write_gates(Path(args.output), collected, read), sep='\n')
            draw_gates(figure, collected if args.layers else last_of_stages(collected), read, args.sort)
            print(figure)
    return report_unreadable(unreadable)
