"""`timm-eca convert`. `convert_weights.py` is the same command."""
import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_eca.weights.official import OFFICIAL, PAPER_ID, TAG

if TYPE_CHECKING:
    from timm_eca.conversion.convert import Conversion

__all__ = ['add_arguments', 'run']

COLLECTION = 'ECA-Net'
DESCRIPTION = f'The weights of the authors of ECA-Net ({PAPER_ID}) on ImageNet-1k, converted for timm.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Converts a checkpoint of the authors\' code to a folder with model.safetensors, config.json and a card. '
        'Without --output, the folder goes to the weights directory ($TIMM_ECA_HOME), where pretrained=True finds it.')
    parser.add_argument('checkpoint', nargs='*', help='the file, e.g. eca_resnet50_k3557.pth.tar; several with --all')
    parser.add_argument('--download', metavar='MODEL', help='download and convert the authors\' file of this model')
    parser.add_argument(
        '--all', action='store_true',
        help='convert all six published models: use the files that you name, download the others, and keep models that '
             'were converted before')
    parser.add_argument('--official', action='store_true', help='you vouch that the file is the authors\' own')
    parser.add_argument(
        '--no-ema', action='store_true', help='if the file has averaged weights (EMA), take the raw weights')
    parser.add_argument('--output', metavar='DIR', help='the folder to make')
    parser.add_argument('--tag', help='a name for weights that are not the authors\' own')
    parser.add_argument('--force', action='store_true', help='replace the folder if it exists')
    parser.add_argument('--mean', type=float, nargs='+', help='means of the input channels, if not ImageNet\'s')
    parser.add_argument('--std', type=float, nargs='+', help='standard deviations of the input channels')
    parser.add_argument(
        '--push-to-hub', metavar='REPO_ID',
        help=f'publish the folder as ORGANISATION/NAME; with --all, name an ORGANISATION only: each model gets a '
             f'repository <model>.{TAG}, and a collection lists them')
    parser.add_argument('--dry-run', action='store_true', help='with --all: print what would be done, and do nothing')


def run(args: argparse.Namespace) -> int:
    if args.all:
        if args.download or args.output or args.tag or args.mean or args.std or args.no_ema:
            args.parser.error('--all goes with files, --official, --force, --push-to-hub and --dry-run only')
        return _run_all(args)
    if len(args.checkpoint) + bool(args.download) != 1:
        args.parser.error('name either one CHECKPOINT, --download MODEL or --all')
    if args.dry_run:
        args.parser.error('--dry-run goes with --all')
    if args.download and (args.mean or args.std or args.official):
        args.parser.error('--download goes without --mean, --std and --official: it takes the authors\' own file')
    from timm_eca.commands.push import push_and_report
    from timm_eca.weights.hub import check_repo_id

    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    done = _convert(
        Path(args.checkpoint[0]) if args.checkpoint else None, args.download, args.official,
        output=args.output, tag=args.tag, force=args.force, use_ema=not args.no_ema,
        **({} if args.download else {'mean': args.mean, 'std': args.std}))
    if args.output is not None:
        name = f'local-dir:{done.folder}'
    else:
        name = done.identity.model if done.tag == TAG else f'{done.identity.model}.{done.tag}'
    print(f'  use: timm.create_model({name!r}, pretrained=True)')
    return push_and_report(done.folder, args.push_to_hub) if args.push_to_hub else 0


def _convert(checkpoint: Path | None, model: str | None, official: bool, **options: Any) -> 'Conversion':
    """Converts a file, or downloads the file of a model and converts it, and reports the result."""
    from timm_eca.conversion.convert import convert
    from timm_eca.conversion.download import convert_download

    if checkpoint is not None:
        done = convert(checkpoint, provenance='vouched' if official else None, **options)
    else:
        done = convert_download(model or '', **options)
    content = done.checkpoint
    print(f'{checkpoint or OFFICIAL[done.identity.model].file}: {done.identity}')
    print(f'  SHA-256 {content.sha256}')
    if content.part:
        print(f'  read: {content.part}')
    if content.left_out:
        print(f'  left out: {", ".join(content.left_out)}')
    print(f'  {done.tensors} tensors in {done.folder}, equal to the source bit for bit when loaded again')
    return done


def _run_all(args: argparse.Namespace) -> int:
    from timm_eca.conversion.download import DownloadError
    from timm_eca.conversion.identify import identify
    from timm_eca.conversion.reader import CheckpointError, read_checkpoint
    from timm_eca.weights.hub import add_to_collection, check_repo_id
    from timm_eca.weights.store import find_local_weights, weights_dir

    organisation = args.push_to_hub
    if organisation:
        if '/' in organisation:
            args.parser.error('with --all, --push-to-hub takes the name of an organisation alone')
        check_repo_id(f'{organisation}/{COLLECTION}')
    folders = {model: None if args.force else find_local_weights(f'{model}.{TAG}') for model in OFFICIAL}
    given: dict[str, Path] = {}
    for path in map(Path, args.checkpoint):
        content = read_checkpoint(path)
        identity = identify(content.state_dict, path)
        content.state_dict.clear()
        if not identity.published:
            raise CheckpointError(f'{path} is not a checkpoint that the authors published ({identity})', 'leave it out')
        if given.setdefault(identity.model, path) is not path:
            raise CheckpointError(
                f'{given[identity.model]} and {path} are both of {identity.model}', 'name one of them')
        if (folder := folders[identity.model]) and _source(folder) != content.sha256:
            raise CheckpointError(f'{folder} was converted from another file than {path}', 'replace it with --force')
    repo_ids, failed = [], False
    for model, official in OFFICIAL.items():
        name, folder = f'{model}.{TAG}', folders[model]
        if folder:
            print(f'{name}: already in {folder}')
        elif args.dry_run:
            print(f'{name}: would be converted from {given.get(model) or f"{official.url} (downloaded)"}')
        else:
            try:
                _convert(given.get(model), model, args.official, force=args.force)
            except DownloadError as e:  # go on with the others
                print(f'timm-eca: {e}', file=sys.stderr)
                failed = True
                continue
        if organisation:
            repo_ids.append(f'{organisation}/{name}')
            if args.dry_run:
                print(f'{repo_ids[-1]}: would get it')
            else:
                _push(weights_dir() / name, repo_ids[-1])
    if repo_ids and args.dry_run:
        print(f'{organisation}: would get a collection {COLLECTION!r} of these')
    elif repo_ids:
        print(f'{add_to_collection(organisation, COLLECTION, DESCRIPTION, repo_ids)}: a collection of these')
    return 2 if failed else 0


def _push(folder: Path, repo_id: str) -> None:
    """Publishes weights of the authors, in timm's own form if there is one: then nobody needs this package for them."""
    from timm_eca.commands.push import push_and_report
    from timm_eca.errors import ModelError
    from timm_eca.models.export import export_folder

    # Kept, because a second export has other bytes, and the Hub would get all of it again.
    exported = folder.parent / '.exported' / folder.name
    try:
        if not exported.is_dir() or _source(exported) != _source(folder):
            export_folder(folder, exported, force=True)
        folder = exported
    except ModelError as e:
        print(f'{folder.name}: published in the form of timm_eca, since {e.problem}')
    push_and_report(folder, repo_id)


def _source(folder: Path) -> str | None:
    """The SHA-256 of the file that a folder was converted from."""
    from timm_eca.weights.digests import read_metadata
    from timm_eca.weights.model_folder import WEIGHTS_FILE

    return read_metadata(folder / WEIGHTS_FILE).get('source_sha256')
