"""timm's own form of a model with ECA, which timm loads without this package.

Some of timm's models have an option that puts timm's `EcaModule` behind the last norm of each block, where `add_eca`
puts ECA. timm computes the kernel sizes from the channels. A smaller kernel with zeros at both ends computes the same.
"""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import ByobNet, ResNet, create_model, get_model_args, is_model, model_entrypoint

from timm_eca.errors import ModelError
from timm_eca.layers.attention import ATTENTIONS, attention_of
from timm_eca.layers.norm_attn import named_norm_attn
from timm_eca.weights.key_maps import GATE, nested_names

__all__ = ['as_timm_model', 'without_timm_eca']

# The arguments of `timm.create_model` that put ECA behind the last norm of each block, by the class of the model.
_ARGS: dict[type[nn.Module], dict[str, Any]] = {
    ResNet: {'block_args': {'attn_layer': 'eca'}},
    ByobNet: {'attn_layer': 'eca', 'block_kwargs': {'attn_last': True}},
}


def as_timm_model(model: nn.Module) -> nn.Module:
    """Makes timm's own model of a model with ECA.

    Its outputs equal those of the source without the fused operation (`timm_eca.set_fused`), bit for bit.

    The new model has copies of the tensors, on their devices and in their dtypes. It keeps the training mode and
    frozen parameters. Its `pretrained_cfg` differs in the architecture only: `timm.models.save_for_hf` saves it as e.g.
    `resnet50` with `block_args={'attn_layer': 'eca'}`.

    Args:
        model: A registered model with ECA, or a timm model after `add_eca`.

    Raises:
        ModelError: timm can't build this model: it has no ECA in these places, or its kernels are smaller.
    """
    base, args = _find_base(model)
    first = next(model.parameters())
    try:
        stock = create_model(base, **args, device=first.device)
    except (AssertionError, TypeError) as e:  # ResNeSt and Res2Net take no attention by name
        raise _refuse(model, f'the blocks of timm\'s {base} take no ECA') from e
    stock.to(first.dtype)  # anti-aliasing filters are not in the state dict
    names = nested_names(stock.state_dict())
    tensors = _rename(model, stock, base, names)
    try:
        stock.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise _refuse(model, f'timm\'s {base} with ECA has tensors of other names or shapes') from e
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in stock.named_parameters():
        parameter.requires_grad = names[key] in trained
    record: Any = stock
    cfg: Any = model.pretrained_cfg
    record.pretrained_cfg = record.default_cfg = {**deepcopy(cfg), 'architecture': base}
    return stock.train(model.training)


def without_timm_eca(args: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the arguments that make timm's ECA, the reverse of `_ARGS`.

    Raises:
        ValueError: The attention is not ECA.
    """
    kept = dict(args)
    block_args, block_kwargs = (dict(kept.pop(name, None) or {}) for name in ('block_args', 'block_kwargs'))
    attn_layer = block_args.pop('attn_layer', kept.pop('attn_layer', 'eca'))
    if attn_layer != 'eca':
        raise ValueError(f'its attention is {attn_layer}, not eca')
    block_kwargs.pop('attn_last', None)
    rest = {'block_args': block_args, 'block_kwargs': block_kwargs}
    return kept | {name: value for name, value in rest.items() if value}


def _find_base(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name of the timm model under a model with ECA, and the arguments that make it with timm's ECA."""
    name, places = _name(model), list(named_norm_attn(model))
    if not places:
        raise ModelError(f'{name} has no ECA', 'give it ECA with timm_eca.add_eca')
    for place_name, place in places:
        if attention_of(place.attn) is not ATTENTIONS['eca']:
            raise _refuse(model, f'{place_name}.attn is {type(place.attn).__name__}, not ECA')
    eca_args = next((args for kind, args in _ARGS.items() if isinstance(model, kind)), None)
    if eca_args is None:
        raise _refuse(model, f'timm\'s {type(model).__name__} has no option for ECA behind the last norm of a block')
    if not is_model(name) or not model_entrypoint(name).__module__.startswith('timm_eca.'):
        raise ModelError(f'{name} is not the name of a model with ECA', 'make the model with timm.create_model')
    args = {**getattr(model, '_model_args', {}), **get_model_args(model)}
    args = {key: value for key, value in args.items() if key not in ('attn_layer', 'kernel_sizes')}
    for key, value in eca_args.items():
        args[key] = {**args.get(key, {}), **value} if isinstance(value, dict) else value
    return name.removeprefix('eca_'), args


def _rename(model: nn.Module, stock: nn.Module, base: str, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Copies a model's tensors for timm's own model, by its names and with kernels of its sizes."""
    tensors, renamed = model.state_dict(), {}
    for key, target in stock.state_dict().items():
        name = names[key]
        if name not in tensors:  # frozen norms count no batches: torch starts with 0
            continue
        value = tensors.pop(name)
        if name.endswith(GATE):
            size, timm_size = value.shape[-1], target.shape[-1]
            if size > timm_size:
                place = name.removesuffix(GATE)
                raise _refuse(model, f'{place} has an ECA kernel of {size} where timm\'s {base} makes {timm_size}')
            value = F.pad(value, ((timm_size - size) // 2,) * 2)
        renamed[key] = value.clone()
    if tensors:
        raise _refuse(model, f'timm\'s {base} with ECA has no {next(iter(tensors))}')
    return renamed


def _name(model: nn.Module) -> str:
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    return cfg.get('architecture') or type(model).__name__


def _refuse(model: nn.Module, reason: str) -> ModelError:
    return ModelError(f'{_name(model)} can\'t be saved for timm alone: {reason}.')
