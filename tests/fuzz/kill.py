"""Kills the commands at random moments, by SIGKILL: `python tests/fuzz/kill.py --kills 200 [--seed 1]`.

Afterwards the output is absent, or whole; the same command again succeeds; and nothing is left beside it but what has
`timm_eca` in its name. A repository has the old version or the new one, and one commit more in the end.
"""
import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.forked import run_command
from helpers.hub_double import HubDouble
from helpers.image_folders import FAST, draw
from timm.models import create_model, save_for_hf

from timm_eca.weights.key_maps import to_official

__all__ = ['kill_convert', 'kill_finetune', 'kill_push']

MODEL = 'eca_mobilenetv2_050'


def _time(arguments: Sequence[str]) -> float:
    """Seconds that a whole run takes."""
    start = time.monotonic()
    status, printed = run_command(arguments)
    assert status == 0, printed
    return time.monotonic() - start


def _kill(arguments: Sequence[str], output: Path, kills: int, seed: int, keep: bool = False) -> Counter[str]:
    """Kills a command and runs it again, from a place without the output unless it is kept."""
    generator, found = random.Random(seed), Counter[str]()
    before = {path.name for path in output.parent.iterdir()}
    seconds = _time(arguments)
    while sum(count for what, count in found.items() if what.startswith('killed')) < kills:
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
        killed = run_command(arguments, generator.uniform(0, seconds))[0] is None
        whole = (output / 'config.json').exists()
        assert whole or not keep
        if whole:
            create_model(f'local-dir:{output}', pretrained=True)
        seconds = max(0.9 * seconds, _time(arguments))  # a run that goes on takes less
        create_model(f'local-dir:{output}', pretrained=True)
        left = {path.name for path in output.parent.iterdir()} - before - {output.name}
        left |= {path.name for path in output.rglob('.*')}
        assert all('.timm_eca-' in name for name in left), left
        found[('killed' if killed else 'ended before') + (', whole' if whole else ', absent')] += 1
    return found


def kill_convert(root: Path, kills: int, seed: int, force: bool = False) -> Counter[str]:
    """Kills conversions, with `force` such as replace a folder that is there. Returns how often what was found."""
    torch.save(to_official(create_model(MODEL).state_dict()), root / 'file.pth')
    arguments = ['convert', str(root / 'file.pth'), '--output', str(root / 'output'), '--force']
    return _kill(arguments, root / 'output', kills, seed, keep=force)


def kill_finetune(root: Path, kills: int, seed: int) -> Counter[str]:
    """Kills fine-tuning runs, which go on when they are run again. Returns how often what was found."""
    draw(root / 'data', {'red': 5, 'green': 5})
    arguments = [
        'finetune', str(root / 'data'), *FAST, '--epochs', '3', '--output', str(root / 'output'), '--extend']
    return _kill(arguments, root / 'output', kills, seed)


def kill_push(root: Path, kills: int, seed: int) -> Counter[str]:
    """Kills pushes to a Hub of this process. Returns how often what was found."""
    generator, found = random.Random(seed), Counter[str]()
    folder, old = root / 'folder', dict.fromkeys(('README.md', 'config.json', 'model.safetensors'), b'old')
    save_for_hf(create_model('eca_test_resnet', num_classes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\nA card.')
    new = {name: (folder / name).read_bytes() for name in old}
    with HubDouble() as hub, mock.patch.multiple(
            'huggingface_hub.constants', ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True
    ), mock.patch.dict(os.environ, HF_TOKEN=hub.token, NO_PROXY='127.0.0.1'):
        seconds = 0.7 * _time(['push', str(folder), 'a/b'])  # the first also makes the repository
        while sum(found.values()) < kills:
            repo = hub.add_repo('a/b', old)
            before = len(repo.log())
            run_command(['push', str(folder), 'a/b'], generator.uniform(0, seconds))
            files = {name: repo.head().files[name] for name in old}
            assert files in (old, new)
            assert run_command(['push', str(folder), 'a/b'])[0] == 0
            assert {name: repo.head().files[name] for name in old} == new
            assert len(repo.log()) == before + 1
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == new
            found['old' if files == old else 'new'] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', help='one of convert, convert --force, push, finetune')
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[Path], Counter[str]]] = {
        'convert': lambda root: kill_convert(root, args.kills, args.seed),
        'convert --force': lambda root: kill_convert(root, args.kills, args.seed, force=True),
        'push': lambda root: kill_push(root, args.kills, args.seed),
        'finetune': lambda root: kill_finetune(root, args.kills, args.seed),
    }
    for name, run in runs.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                print(name, dict(run(Path(folder))), flush=True)


if __name__ == '__main__':
    main()
