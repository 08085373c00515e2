"""Registers the models of this package with timm when it is imported."""
from importlib import import_module

import timm
from torch.torch_version import TorchVersion

from timm_eca.version import __version__

_TIMM_MIN = '1.0.31'

if TorchVersion(timm.__version__) < TorchVersion(_TIMM_MIN):
    raise ImportError(
        f'timm_eca {__version__} needs timm {_TIMM_MIN} or newer, but {timm.__file__} is {timm.__version__}: '
        'pip install -U timm')
for _name in ('eca_mobilenetv2', 'eca_resnet', 'eca_twins'):  # the last registers all models that are left
    import_module(f'timm_eca.models.{_name}')
