"""Much at once, and long: `python tests/fuzz/load.py [--scale 1.0]`.

All six official models converted in parallel, ten at a time, in threads and in processes; models created 10,000 times;
10,000 images classified. Prints the memory that each took, in MiB, and fails where it grows with the number of times.
"""
import argparse
import contextlib
import gc
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.forked import fork, wait
from helpers.official_files import official_state_dict, save_official
from PIL import Image
from timm.models import create_model, save_for_hf

from timm_eca.commands.main import main as command
from timm_eca.conversion.convert import convert
from timm_eca.conversion.verify import verify
from timm_eca.weights.official import OFFICIAL

__all__ = ['classify', 'convert_all', 'create']


def _memory(kind: str = 'VmRSS') -> int:
    """MiB of this process, now or (VmHWM) at most."""
    found = re.search(rf'{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found
    return int(found[1]) // 1024


def convert_all(root: Path, times: int) -> str:
    """Converts all models, each several times: in threads, then in processes."""
    files = [save_official(root / f'{model}.pth.tar', official_state_dict(model)) for model in OFFICIAL]
    work = [(file, root / f'{file.stem}-{number}') for number in range(times) for file in files]
    with ThreadPoolExecutor(10) as pool:
        done = list(pool.map(lambda pair: convert(*pair).folder, work))
    peak = _memory('VmHWM')
    children: list[int] = []
    for file, folder in work:
        if len(children) == 10:
            assert wait(children.pop(0)) == 0
        children.append(fork(lambda file=file, folder=folder: 0 if convert(file, f'{folder}-p') else 1))
    assert all(wait(child) == 0 for child in children)
    for folder in done:
        for one in (folder, Path(f'{folder}-p')):
            assert all(check.ok is not False for check in verify(one)), one
    left = {path.name for path in root.iterdir() if path.name.startswith('.')}
    assert not left, left
    return f'{len(work)} conversions in 10 threads and as many in 10 processes, at most {peak} MiB in the first'


def _steady(step: Callable[[int], None], steps: int, allowed: int) -> str:
    """Memory after a fifth of the steps and after all of them."""
    for index in range(steps):
        step(index)
        if index == steps // 5:
            gc.collect()
            first = _memory()
    gc.collect()
    last = _memory()
    assert last - first <= allowed, f'{first} MiB after {steps // 5}, {last} after {steps}'
    return f'{first} MiB after {steps // 5}, {last} after {steps}'


def create(count: int) -> str:
    """Creates and forgets models, of all kinds in turn."""
    names = ('eca_test_resnet', 'eca_mobilenetv2_050', 'eca_resnet18', 'eca_test_efficientnet')
    return 'models created: ' + _steady(lambda index: create_model(names[index % 4], num_classes=3) and None, count, 16)


def classify(root: Path, count: int) -> str:
    """Classifies a folder of images, one in ten of them damaged, with the command."""
    save_for_hf(create_model('eca_test_resnet', num_classes=3), root / 'model', safe_serialization=True)
    (root / 'images').mkdir()
    Image.effect_noise((320, 240), 50).convert('RGB').save(root / 'whole.jpg')
    (root / 'cut.jpg').write_bytes((root / 'whole.jpg').read_bytes()[:3000])
    for index in range(count):
        os.link(root / ('cut.jpg' if index % 10 == 0 else 'whole.jpg'), root / 'images' / f'{index}.jpg')
    rows: list[int] = []

    class Watch(io.StringIO):
        """Notes the memory as the lines come."""

        def write(self, text: str) -> int:
            if text.endswith('.jpg'):
                rows.append(_memory())
            return len(text)

    with contextlib.redirect_stdout(Watch()), contextlib.redirect_stderr(io.StringIO()):
        assert command(['predict', str(root / 'images'), '--model', str(root / 'model')]) == 1
    assert len(rows) == count - -(-count // 10)
    first, last = rows[len(rows) // 5], rows[-1]
    assert last - first <= 16, f'{first} MiB, then {last}'
    return f'images: {first} MiB after {len(rows) // 5}, {last} after {len(rows)}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(':')[0])
    parser.add_argument('--scale', type=float, default=1.0, help='of the 10,000 models and images, and 60 conversions')
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'predict').mkdir()
        print(create(int(10000 * args.scale)), f'{time.time() - start:.0f} s', flush=True)
        print(classify(Path(folder) / 'predict', int(10000 * args.scale)), f'{time.time() - start:.0f} s', flush=True)
        (Path(folder) / 'convert').mkdir()
        print(convert_all(Path(folder) / 'convert', max(1, int(10 * args.scale))), f'{time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
