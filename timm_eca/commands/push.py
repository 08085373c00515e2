"""`timm-eca push`. `convert` and `finetune` also publish with it."""
import argparse
from pathlib import Path
from typing import Any

__all__ = ['add_arguments', 'push_and_report', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Uploads a folder in one commit: model.safetensors, config.json and README.md. If finetune made the folder, it '
        'also uploads metrics.csv, curves.png, and confusion_matrix.png or confusions.csv. A README.md that somebody '
        'edited on the Hub stays.')
    parser.add_argument('folder', help='a folder that convert or finetune made')
    parser.add_argument('repo_id', help='ORGANISATION/NAME')
    parser.add_argument(
        '--private', action='store_true', help='create a private repository, and upload nothing to a public one')
    parser.add_argument('--revision', metavar='BRANCH', help='commit to this branch instead of main')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--replace-card', action='store_true', help='replace a README.md that was edited on the Hub')
    parser.add_argument(
        '--dry-run', action='store_true',
        help='print what would be uploaded, and upload nothing')


def run(args: argparse.Namespace) -> int:
    return push_and_report(
        args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
        replace_card=args.replace_card, dry_run=args.dry_run)


def push_and_report(folder: str | Path, repo_id: str, **options: Any) -> int:
    from timm_eca.weights.hub import push_folder  # imports torch: `--help` must not wait for it
    done = push_folder(folder, repo_id, **options)
    files = ', '.join(f'{name} ({size:,} bytes)' for name, size in done.files.items())
    if done.url is None:
        print(f'{repo_id}: would get {files}')
    elif done.changed:
        print(f'{repo_id}: {files} in {done.url}')
    else:
        print(f'{repo_id} has these files already, no commit made')
    for note in done.notes:
        print(f'{repo_id}: {note}')
    return 0
