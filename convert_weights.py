#!/usr/bin/env python3
"""Converts a checkpoint of the authors of ECA-Net for timm and the Hugging Face Hub: the same as `timm-eca convert`."""
import sys

from timm_eca.commands.main import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:]]))
