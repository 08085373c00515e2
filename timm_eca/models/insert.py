"""Puts ECA, or another attention, into the residual blocks of a timm model, and takes it out again.

All models get ECA this way: the registered ones are timm's models, changed by `insert_attn`.
"""
import logging
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch.nn as nn
from timm.layers import CecaModule, EcaModule
from timm.models import is_model, model_entrypoint

from timm_eca.errors import ModelError
from timm_eca.layers.attention import attention_of, get_attention
from timm_eca.layers.eca import adaptive_kernel_size, check_kernel_size
from timm_eca.layers.norm_attn import NormAttn, named_norm_attn, scale_and_shift
from timm_eca.models.sites import BlockSite, find_site
from timm_eca.weights.key_maps import nested_names, stage_of
from timm_eca.weights.names import base_name, twin_name

__all__ = [
    'FAMILIES', 'KernelSizes', 'add_attn', 'add_eca', 'insert_attn', 'remove_eca', 'resolve_kernel_sizes', 'twin_name',
]

_logger = logging.getLogger(__name__)

KernelSizes: TypeAlias = str | int | Sequence[int]
ModelT = TypeVar('ModelT', bound=nn.Module)

FAMILIES = (
    'resnet', 'hrnet', 'res2net', 'resnest', 'sknet', 'senet', 'tresnet', 'dla', 'regnet', 'byobnet', 'byoanet',
    'cspnet', 'efficientnet', 'mobilenetv3', 'mobilenetv5', 'hardcorenas', 'rexnet', 'mobilevit', 'repvit',
    'efficientvit_mit', 'xception', 'xception_aligned', 'convmixer', 'vision_transformer_hybrid',
)


def resolve_kernel_sizes(kernel_sizes: Any, stages: Sequence[str], channels: Sequence[int]) -> list[int]:
    """The kernel size of each block, for `kernel_sizes` of `add_eca` and the stage and the channels of each block."""
    if isinstance(kernel_sizes, str) and kernel_sizes == 'adaptive':
        return [adaptive_kernel_size(c) for c in channels]
    names = list(dict.fromkeys(stages))
    several = isinstance(kernel_sizes, Sequence) and not isinstance(kernel_sizes, str | bytes)
    try:
        sizes = dict(zip(names, kernel_sizes if several else [kernel_sizes] * len(names), strict=True))
        return [check_kernel_size(sizes[stage]) for stage in stages]
    except ValueError as e:
        raise ModelError(
            f"kernel_sizes must be 'adaptive', one odd, positive integer, or a sequence of {len(names)} such "
            f'integers, one for each stage; got {kernel_sizes!r}') from e


def _is_ours(name: str) -> bool:
    """Whether this package registered the model: `eca_resnet33ts` is timm's own, with ECA elsewhere."""
    return is_model(name) and model_entrypoint(name).__module__.startswith('timm_eca.')


def insert_attn(model: ModelT, attn_layer: str, kernel_sizes: KernelSizes) -> ModelT:
    """Puts attention, with random weights, behind the last norm of each residual block of a timm model, in place.

    A `NormAttn` takes the place of the norm and holds it: ECA's weights are `<block>.<norm>.attn.conv.weight`. The
    attention gets the block's device, dtype and training mode. Arguments and errors are those of `add_attn`.
    """
    attention = get_attention(attn_layer)
    stages, blocks, sites = zip(*_find_sites(model))
    channels = [site.channels for site in sites]
    unfit = sorted({c for c in channels if c % attention.divisor})
    if unfit:
        raise ModelError(
            f'{attn_layer} needs a multiple of {attention.divisor} channels in each block, and {type(model).__name__} '
            f'has blocks of {", ".join(map(str, unfit))}', 'choose another attn_layer or another model')
    sizes = resolve_kernel_sizes(kernel_sizes, stages, channels)
    for block, site, size in zip(blocks, sites, sizes):
        weight = next(block.parameters())
        layer = attention.make(site.channels, size, device=weight.device, dtype=weight.dtype)
        place = NormAttn(site.norm, layer.train(block.training))
        place.training = block.training  # not .train(): a frozen norm stays frozen
        block.set_submodule(site.name, place)
        block.register_load_state_dict_pre_hook(load_eca_beside_norm)
    _logger.info(f'Attention ({attn_layer}) put into {len(blocks)} blocks of {type(model).__name__}.')
    return model


def load_eca_beside_norm(block: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Lets a block load ECA that stands beside its norm, as in the authors' ResNets and in timm's own models with ECA.

    A pre-hook of `load_state_dict`: without it ECA's weights would be lost, and the norm would get a warm start.
    """
    if any(named_norm_attn(block)):
        for key, name in nested_names(state_dict).items():
            state_dict[name] = state_dict.pop(key)


def _find_sites(model: nn.Module) -> list[tuple[str, nn.Module, BlockSite]]:
    """The places for attention, each with its stage and its block."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, NormAttn | EcaModule | CecaModule):
            raise ModelError(f'{type(model).__name__} has ECA already, in {name}', 'use it as it is')
        site = find_site(module)
        if site is not None:
            sites.append((stage_of(f'{name}.{site.name}'), module, site))
    if not sites:
        raise ModelError(
            f'{type(model).__name__} has no place for ECA: no residual block that ends in a norm without an activation',
            f'use a model of one of these families of timm: {", ".join(FAMILIES)}')
    return sites


def add_eca(model: ModelT, kernel_sizes: KernelSizes = 'adaptive', warm_start: bool = True) -> ModelT:
    """Gives a timm model ECA behind the last norm of each residual block, in place, without losing its weights.

    With a warm start the model computes what it did before, bit for bit: ECA's convolutions are zero, so every gate is
    sigmoid(0) = 0.5, and the scales and shifts of the norms before them are doubled. The gates' gradients are not zero,
    so fine-tuning learns the attention from there. `remove_eca` undoes it.

    A block gets no ECA if its last norm has an activation, or if it ends in no norm. `timm.models.save_for_hf` saves
    the model as its `eca_` twin.

    Args:
        model: A timm model of one of the families in `timm_eca.models.insert.FAMILIES`.
        kernel_sizes: One odd integer for each stage, one for all stages, or 'adaptive' (paper, eq. 12).
        warm_start: Keep the outputs of the model. Otherwise the gates' weights are random.

    Returns:
        The same model.

    Raises:
        ModelError: A ValueError. The model has ECA, no place for it or no twin, a norm has no scale to double, or the
            kernel sizes are not accepted. The model is unchanged.
    """
    return add_attn(model, 'eca', kernel_sizes, warm_start)


def add_attn(
        model: ModelT, attn_layer: str, kernel_sizes: KernelSizes = 'adaptive', warm_start: bool = True) -> ModelT:
    """Gives a timm model an attention of the paper's comparison, in the places where `add_eca` puts ECA.

    A warm start multiplies the norms before two gates (`'cbam'`, `'coord'`) by 4. `'se_var1'` has no parameters, so its
    gates can't be constant. `'se_gc'` needs a multiple of 16 channels in each block: MobileNetV2 has no place for it.

    Args:
        model: As for `add_eca`.
        attn_layer: Name of the attention, one of `timm_eca.layers.attention.ATTENTIONS`.
        kernel_sizes: As for `add_eca`, for `'eca'`, `'eca_ns'` and `'ceca'`. The others have none.
        warm_start: As for `add_eca`.

    Raises:
        ModelError: As for `add_eca`, or there is no such attention, or it has no warm start or no place in the model.
    """
    attention = get_attention(attn_layer)
    base, sites = _architecture(model), _find_sites(model)
    if base and not _is_ours(twin_name(base)):
        raise ModelError(
            f'timm_eca has no {twin_name(base)}, the name under which {base} with ECA would be saved',
            f'use a model of one of these families of timm: {", ".join(FAMILIES)}')
    if warm_start:
        if not attention.zero_init_keys:
            raise ModelError(f'{attn_layer} has no parameters, so its gates can\'t be constant', 'use warm_start=False')
        for stage, _, site in sites:
            if not scale_and_shift(site.norm):
                raise ModelError(
                    f'A {site.name} in {stage} has no scale for a warm start to double', 'use warm_start=False')
    plain = model.state_dict()
    insert_attn(model, attn_layer, kernel_sizes)
    if warm_start:
        model.load_state_dict(plain)
    if base:
        _record(
            model, twin_name(base), attn_layer=None if attn_layer == 'eca' else attn_layer,
            kernel_sizes=kernel_sizes if isinstance(kernel_sizes, str) else (
                [*map(int, kernel_sizes)] if isinstance(kernel_sizes, Sequence) else int(kernel_sizes)))
    return model


def remove_eca(model: ModelT) -> ModelT:
    """Removes the attention of `add_eca` or `add_attn`, in place, while its gates are still constant.

    The constant gates are folded into the norms before them, exactly. The norms may have been converted or frozen.
    Returns the same model.

    Raises:
        ModelError: A ValueError. The model has no such attention, gates that depend on the input, or a norm without a
            scale. The model is unchanged.
    """
    places, factors = list(named_norm_attn(model)), []
    if not places:
        raise ModelError(f'{type(model).__name__} has no ECA to remove', 'use it as it is')
    for name, place in places:
        attention, tensors = attention_of(place.attn), place.attn.state_dict()
        if attention is None or not attention.zero_init_keys or any(
                tensors[key].any() for key in attention.zero_init_keys):
            raise ModelError(f'{name}.attn has gates that depend on the input', 'keep it, it can\'t be removed')
        if not scale_and_shift(place.norm):
            raise ModelError(f'{name}.norm has no scale for the gates', 'remove ECA before the norms are fused away')
        factors.append(attention.factor)
    for (name, place), factor in zip(places, factors):
        for tensor in scale_and_shift(place.norm).values():
            tensor.data.div_(factor)
        model.set_submodule(name, place.norm)
    twin = _architecture(model)
    if twin and _is_ours(twin):
        _record(model, base_name(twin), kernel_sizes=None, attn_layer=None)
    return model


def _architecture(model: nn.Module) -> str | None:
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    return cfg.get('architecture') if cfg else None


def _record(model: nn.Module, architecture: str, **args: Any) -> None:
    """Makes `save_for_hf` save the model under this architecture, with these arguments."""
    record: Any = model
    record.pretrained_cfg = record.default_cfg = {**record.pretrained_cfg, 'architecture': architecture}
    # timm keeps the arguments of `create_model` here, and exports no function to add to them.
    record._model_args = {k: v for k, v in {**getattr(model, '_model_args', {}), **args}.items() if v is not None}
