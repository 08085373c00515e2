"""ECA-Net for timm: importing this package registers the `eca_*` models with `timm.create_model`."""
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_eca.version import __version__

if TYPE_CHECKING:
    from timm_eca.analysis.gates import gates
    from timm_eca.conversion.convert import convert
    from timm_eca.layers.eca import EfficientChannelAttention, adaptive_kernel_size
    from timm_eca.layers.fused import set_fused
    from timm_eca.models.insert import add_attn, add_eca, remove_eca
    from timm_eca.models.param_groups import param_groups
    from timm_eca.models.timm_form import as_timm_model
    from timm_eca.weights.key_maps import to_official, to_timm

__all__ = [
    'EfficientChannelAttention', '__version__', 'adaptive_kernel_size', 'add_attn', 'add_eca', 'as_timm_model',
    'convert', 'gates', 'param_groups', 'remove_eca', 'set_fused', 'to_official', 'to_timm',
]

# The module of each public name. The first use of a name imports its module.
_MODULES = {
    'EfficientChannelAttention': 'layers.eca',
    'adaptive_kernel_size': 'layers.eca',
    'add_attn': 'models.insert',
    'add_eca': 'models.insert',
    'as_timm_model': 'models.timm_form',
    'convert': 'conversion.convert',
    'gates': 'analysis.gates',
    'param_groups': 'models.param_groups',
    'remove_eca': 'models.insert',
    'set_fused': 'layers.fused',
    'to_official': 'weights.key_maps',
    'to_timm': 'weights.key_maps',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _runs_as_command() -> bool:
    """Whether this process is `timm-eca` or `python -m timm_eca`."""
    argv = getattr(sys, 'argv', None) or ['']  # a Python inside another program may have none
    return os.path.basename(argv[0]) in ('timm-eca', 'timm-eca.exe') or (
        argv[0] == '-m' and sys.orig_argv[-len(argv):][:1] == [__name__])


# A command registers the models after it has parsed its options: `--help` must not wait for torch.
if not _runs_as_command():
    import_module('timm_eca.models.registration')
