"""Draws folders of images to fine-tune on. Options of a quick run."""
from pathlib import Path

import torch
from PIL import Image

__all__ = ['COLOURS', 'FAST', 'MODEL', 'draw']

MODEL = 'eca_mobilenetv2_050'
FAST = ['--model', MODEL, '--no-pretrained', '--img-size', '32', '--batch-size', '8', '--workers', '0']
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
