"""Draws folders of images. Options of a quick training run."""
from pathlib import Path

import torch
from PIL import Image

__all__ = ['COLOURS', 'FAST', 'MODEL', 'draw', 'images', 'touch']

MODEL = 'eca_mobilenetv2_050'
FAST = ['--model', 'eca_test_resnet', '--no-pretrained', '--img-size', '32', '--batch-size', '8', '--workers', '0']
COLOURS = {'green': (20, 200, 40), 'red': (220, 30, 30), 'yellow': (230, 220, 20)}


def draw(folder: Path, counts: dict[str, int]) -> Path:
    """Draws noisy images of a colour for each class, in a folder for each class."""
    generator = torch.Generator().manual_seed(sum(counts.values()))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = torch.randint(-20, 20, (24, 24, 3), generator=generator)
            pixels = (noise + torch.tensor(COLOURS.get(name, (90, 90, 90)))).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f'{index}.png')
    return folder


def images(*folders: str, count: int = 4) -> list[str]:
    """The names of some images in folders."""
    return [f'{folder}/{i}.png' for folder in folders for i in range(count)]


def touch(root: Path, *names: str) -> None:
    """Makes small images, no two alike, and folders where a name ends with a slash."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('/'):
            path.mkdir()
        else:
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path, format='PNG')
