"""ECA-Net for timm: importing this package registers the `eca_*` models with `timm.create_model`."""
from typing import TYPE_CHECKING, Any

from timm import __version__ as _timm_version
from torch.torch_version import TorchVersion as _Version

from timm_eca.version import __version__

_TIMM_MIN = '1.0.31'
if _Version(_timm_version) < _Version(_TIMM_MIN):
    raise ImportError(
        f'timm_eca {__version__} needs timm {_TIMM_MIN} or newer, this is {_timm_version}: pip install -U timm')

from timm_eca.analysis.gates import gates
from timm_eca.layers.eca import EfficientChannelAttention, adaptive_kernel_size
from timm_eca.layers.fused import set_fused
from timm_eca.models import eca_mobilenetv2 as _eca_mobilenetv2  # noqa: F401 (registers)
from timm_eca.models import eca_resnet as _eca_resnet  # noqa: F401 (registers)
from timm_eca.models import eca_twins as _eca_twins  # noqa: F401 (registers what is not registered yet)
from timm_eca.models.insert import add_attn, add_eca, remove_eca
from timm_eca.models.param_groups import param_groups
from timm_eca.models.timm_form import as_timm_model
from timm_eca.weights.key_maps import to_official, to_timm

if TYPE_CHECKING:
    from timm_eca.conversion.convert import convert

__all__ = [
    'EfficientChannelAttention', '__version__', 'adaptive_kernel_size', 'add_attn', 'add_eca', 'as_timm_model',
    'convert', 'gates', 'param_groups', 'remove_eca', 'set_fused', 'to_official', 'to_timm',
]


def __getattr__(name: str) -> Any:
    """Imports `convert` when it is first used: models and training do without it."""
    if name == 'convert':
        from timm_eca.conversion.convert import convert
        return convert
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
