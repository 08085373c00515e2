"""ECA-Net for timm: importing this package registers the `eca_*` models with `timm.create_model`."""
from timm import __version__ as _timm_version
from torch.torch_version import TorchVersion as _Version

from timm_eca.version import __version__ as __version__

_TIMM_MIN = '1.0.31'
if _Version(_timm_version) < _Version(_TIMM_MIN):
    raise ImportError(
        f'timm_eca {__version__} needs timm {_TIMM_MIN} or newer, this is {_timm_version}: pip install -U timm')

from timm_eca import eca_mobilenetv2 as _eca_mobilenetv2, eca_resnet as _eca_resnet  # noqa: E402, F401 (registers)
from timm_eca import eca_twins as _eca_twins  # noqa: E402, F401 (registers what is not registered yet)
from timm_eca.channel_weights import gates as gates  # noqa: E402
from timm_eca.eca import EfficientChannelAttention as EfficientChannelAttention  # noqa: E402
from timm_eca.eca import adaptive_kernel_size as adaptive_kernel_size  # noqa: E402
from timm_eca.insert import add_attn as add_attn, add_eca as add_eca, remove_eca as remove_eca  # noqa: E402
from timm_eca.tail import set_fused as set_fused  # noqa: E402
