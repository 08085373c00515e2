"""`timm-eca push`, and what other commands use of it."""
import argparse
from pathlib import Path

from timm_eca.weights.hub import push_folder

__all__ = ['add_arguments', 'push_and_report', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Uploads model.safetensors, config.json and README.md of a folder in one commit.'
    parser.add_argument('folder', help='a folder that convert or finetune made')
    parser.add_argument('repo_id', help='ORGANISATION/NAME')
    parser.add_argument('--private', action='store_true', help='make a new repository a private one')
    parser.add_argument('--revision', metavar='BRANCH', help='commit to this branch instead of main')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--dry-run', action='store_true', help='say what would be uploaded, and upload nothing')


def run(args: argparse.Namespace) -> int:
    return push_and_report(args.folder, args.repo_id, args.private, args.revision, args.create_pr, args.dry_run)


def push_and_report(
        folder: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: bool = False,
) -> int:
    done = push_folder(folder, repo_id, private, revision, create_pr, dry_run)
    files = ', '.join(f'{name} ({size:,} bytes)' for name, size in done.files.items())
    if done.url is None:
        print(f'{done.repo_id}: would get {files}')
    elif done.changed:
        print(f'{done.repo_id}: {files} in {done.url}')
    else:
        print(f'{done.repo_id} has these files already, no commit made')
    return 0
