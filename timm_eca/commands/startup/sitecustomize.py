"""Registers the models in Python processes that a script under `timm-eca run` starts.

`timm-eca run` puts this folder first on `PYTHONPATH`, and Python imports a module of this name when it starts. The
module only prepares the import of timm: a process that doesn't import timm doesn't wait for anything.
"""
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _RegisterAfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and has timm_eca imported right after it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != 'timm':
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(_execute_and_register, loader.exec_module)
        return spec


def _execute_and_register(execute: Callable[[ModuleType], None], timm: ModuleType) -> None:
    execute(timm)
    with contextlib.suppress(ModuleNotFoundError):  # another Python's timm, without timm_eca
        importlib.import_module('timm_eca')


sys.meta_path.insert(0, _RegisterAfterTimm())
# Python imports only one sitecustomize: this one runs the next.
_next = PathFinder.find_spec('sitecustomize', [entry for entry in sys.path if entry != os.path.dirname(__file__)])
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
