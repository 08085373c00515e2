"""A norm and the attention behind it, in the place of the norm."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from timm_eca.layers.attention import attention_of
from timm_eca.layers.fused import fused_norm_eca

__all__ = ['NormAttn', 'load_plain_norm', 'named_norm_attn', 'scale_and_shift', 'scaled_norm']


class NormAttn(nn.Module):
    """The last norm of a residual block and the attention behind it: `attn(norm(x))`.

    It takes the place of the norm, so the block itself stays as it is, and tools that convert, freeze or fuse norms
    find the norm inside. Batch norm and ECA run as one operation where that computes the same
    (`timm_eca.layers.fused`). `load_state_dict` takes the tensors of the plain norm, too (`load_plain_norm`).

    Shape:
        - Input: (N, C, H, W).
        - Output: the same.
    """

    def __init__(self, norm: nn.Module, attn: nn.Module) -> None:
        """`norm` may be a sequence whose last module is the norm."""
        super().__init__()
        self.norm = norm
        self.attn = attn
        self.register_load_state_dict_pre_hook(load_plain_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            out = fused_norm_eca(x, self.norm, self.attn)
            if out is not None:
                return out
        return self.attn(self.norm(x))


def load_plain_norm(place: NormAttn, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loads a plain norm as a warm start: the model then gives the outputs of the plain model.

    A pre-hook of `load_state_dict`, which changes the dict but writes to no tensor. `bn3.weight` becomes
    `bn3.norm.weight`. If the dict has the norm's scale but no attention for this place, the scale and the shift are
    multiplied by the attention's factor, and tensors are added that make the gates constant. Gates of other attentions,
    or without parameters, can't be constant: then only the names change.
    """
    norm_prefix, attn_prefix = f'{prefix}norm.', f'{prefix}attn.'
    own = [key for key in state_dict if key.startswith(prefix)]
    plain = [key for key in own if not key.startswith((norm_prefix, attn_prefix))]
    attention = attention_of(place.attn)
    scaled = {f'{prefix}{name}' for name in scale_and_shift(place.norm)}
    warm = (
        any(key in scaled and key.endswith('weight') for key in plain)
        and not any(key.startswith(attn_prefix) for key in own))
    for key in plain:
        value = state_dict.pop(key)
        if attention and attention.zero_init_keys and warm and key in scaled:
            with torch.no_grad():
                value = value * attention.factor
            if key.endswith('weight'):
                for name, tensor in place.attn.state_dict().items():
                    if name in attention.zero_init_keys:
                        state_dict[f'{attn_prefix}{name}'] = value.new_zeros(tensor.shape)
                    elif not tensor.is_meta:
                        state_dict[f'{attn_prefix}{name}'] = tensor
        state_dict[f'{norm_prefix}{key.removeprefix(prefix)}'] = value


def scaled_norm(norm: nn.Module) -> nn.Module:
    """The module that has the scale and the shift: the norm itself, or the last module of a sequence."""
    return norm[-1] if isinstance(norm, nn.Sequential) and len(norm) else norm


def scale_and_shift(norm: nn.Module) -> dict[str, torch.Tensor]:
    """The scales and shifts of a norm by their names, e.g. `weight`, or `bn.weight` of a sequence that ends in it."""
    last = scaled_norm(norm)
    prefix = '' if last is norm else f'{next(reversed(norm._modules))}.'
    # Those of frozen norms are buffers. Split batch norm has several.
    return {
        f'{prefix}{name}': tensor for name, tensor in (*last.named_parameters(), *last.named_buffers())
        if name.rpartition('.')[2] in ('weight', 'bias')}


def named_norm_attn(model: nn.Module) -> Iterator[tuple[str, NormAttn]]:
    """The places of a model that have attention, with their names, e.g. `layer1.0.bn3`."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NormAttn))
