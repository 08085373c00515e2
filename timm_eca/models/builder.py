"""Builds the registered models: makes timm's model, puts ECA in, loads weights, and wraps it for features."""
import sys
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch.nn as nn
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, model_entrypoint, resolve_model_input_args,
)

from timm_eca.conversion.pretrained import default_weights, find_pretrained, no_weights
from timm_eca.models.checkpoint_filter import checkpoint_filter_fn
from timm_eca.models.insert import insert_attn
from timm_eca.models.timm_form import without_timm_eca
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.weights.store import HUB_ERRORS, WeightsNotFoundError, hub_id, unreadable_weights, weights_dir

__all__ = ['build_eca_model', 'eca_cfgs']

PretrainedCfgT: TypeAlias = str | Mapping[str, Any] | PretrainedCfg | None

# Families whose feature extractor is its own class.
_OWN_FEATURES = ('hrnet', 'efficientnet', 'mobilenetv3', 'hardcorenas')
# For the other families timm wraps the model, with these settings.
_FEATURE_CFGS: dict[str, dict[str, Any]] = {
    'rexnet': {'flatten_sequential': True},
    'byobnet': {'flatten_sequential': True},
    'byoanet': {'flatten_sequential': True},
    'mobilevit': {'flatten_sequential': True},
    'cspnet': {'flatten_sequential': True},
    'repvit': {'flatten_sequential': True, 'out_indices': (0, 1, 2, 3)},
    'efficientvit_mit': {'flatten_sequential': True, 'out_indices': (0, 1, 2, 3)},
    'tresnet': {'flatten_sequential': True, 'out_indices': (1, 2, 3, 4)},
    'dla': {'out_indices': (1, 2, 3, 4, 5)},
    'xception': {'feature_cls': 'hook'},
    'xception_aligned': {'flatten_sequential': True, 'feature_cls': 'hook'},
    'mobilenetv5': {'feature_cls': 'getter'},
    'convmixer': {'feature_cls': 'getter', 'out_indices': 3},
    'vision_transformer_hybrid': {'feature_cls': 'getter', 'out_indices': 3},
}
# Families for which timm's weights have tensors that no model needs.
_UNUSED_TENSORS = ('dla', 'mobilenetv5')


def build_eca_model(
        variant: str,
        base: str,
        pretrained: bool = False,
        pretrained_cfg: PretrainedCfgT = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        variant: Name of the model.
        base: Name of the timm model that gets ECA.
        pretrained: Load the weights that `find_pretrained` finds.
        pretrained_cfg: The weights: a tag, or a config. The weights directory may have more tags than the registry.
        pretrained_cfg_overlay: Entries that replace those of the config.
        **kwargs: Arguments of the base model and of `timm.models.build_model_with_cfg`, and `kernel_sizes` and
            `attn_layer` of `timm_eca.add_attn`. They replace those of the weights. By default the kernel sizes are the
            authors', or 'adaptive' for other models.

    Raises:
        WeightsNotFoundError: No source has the weights, or they can't be loaded.
        ModelError: A ValueError. The kernel sizes are not valid, or the checkpoint does not fit the model.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    weights = _name_weights(variant, pretrained_cfg, overlay)
    folder = None
    if weights is not None and (pretrained or weights not in get_arch_pretrained_cfgs(variant)):
        folder = find_pretrained(weights, kwargs.get('cache_dir'))
    saved: dict[str, Any] = {}
    if weights is not None and folder is not None:
        pretrained_cfg, saved = _read_folder(folder, variant)
        if folder.parent != weights_dir():
            overlay['hf_hub_id'] = hub_id(weights)  # for the card of a fine-tuned model
        kwargs = {**saved, **kwargs, 'pretrained_model_args': saved}
    kernel_sizes = kwargs.pop('kernel_sizes', None)
    attn_layer = kwargs.pop('attn_layer', None) or 'eca'
    if kernel_sizes is None:
        kernel_sizes = OFFICIAL[variant].kernel_sizes if variant in OFFICIAL else 'adaptive'

    family = model_entrypoint(base).__module__.rpartition('.')[2]
    base_features = (  # if the caller says how, timm wraps the whole model
        family in _OWN_FEATURES and not kwargs.keys() & {'feature_cls', 'feature_cfg'}
        and bool(kwargs.pop('features_only', False)))
    if family in _FEATURE_CFGS:
        kwargs.setdefault('feature_cfg', dict(_FEATURE_CFGS[family]))
    strict = kwargs.pop('pretrained_strict', True)

    def build(**kwargs: Any) -> nn.Module:
        if base_features:
            kwargs['features_only'] = True
        return insert_attn(model_entrypoint(base)(**kwargs), attn_layer, kernel_sizes)

    try:
        model: Any = build_model_with_cfg(
            build,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=partial(checkpoint_filter_fn, base=base, drop_head=base_features, strict=strict),
            # The filter itself checks that no tensor is missing. A feature extractor has no head to load.
            pretrained_strict=strict and not base_features and family not in _UNUSED_TENSORS,
            **kwargs,
        )
    except (*HUB_ERRORS, OSError, SafetensorError) as e:  # type: ignore[misc]
        if weights is None:
            raise
        raise (no_weights(weights, e) if folder is None else unreadable_weights(folder, e)) from e
    except RuntimeError as e:  # torch's, for tensors of other names or shapes
        if folder is None:
            raise
        raise WeightsNotFoundError(
            f'The weights in {folder} do not fit this model ({" ".join(str(e).split())})',
            'check the arguments of the model',
            'replace the folder with `timm-eca convert --force` if it is damaged') from e
    if saved:
        model._model_args = saved  # for save_for_hf. create_model adds the caller's arguments
    if base_features:
        no_head = {k: v for k, v in model.pretrained_cfg.items() if k not in ('num_classes', 'classifier')}
        model.pretrained_cfg = model.default_cfg = no_head
    return model


def eca_cfgs(variant: str, base: str) -> dict[str, PretrainedCfg]:
    """The pretrained configs of a model, for `default_cfgs`: the authors' weights, and timm's for warm starts."""
    # Not from the registry: it returns copies, which would take most of the time of the import.
    cfgs = sys.modules[model_entrypoint(base).__module__].default_cfgs[base].cfgs
    found = {}
    if variant in OFFICIAL:
        plain, name = cfgs[next(iter(cfgs))], f'{variant}.{TAG}'
        found[name] = PretrainedCfg(
            hf_hub_id=hub_id(name), pool_size=(7, 7), interpolation='bilinear', first_conv=plain.first_conv,
            classifier=plain.classifier, license='mit', origin_url=REPOSITORY, paper_name=PAPER_NAME,
            paper_ids=PAPER_ID)
    for tag, cfg in cfgs.items():
        if cfg.hf_hub_id == 'timm/':  # timm's registry adds the name of the model
            cfg = copy(cfg)  # ten times as fast as dataclasses.replace
            cfg.hf_hub_id = f'timm/{base}.{tag}'
        found[f'{variant}.{tag}' if tag else variant] = cfg
    return found


def _read_folder(folder: Path, variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pretrained config and the arguments of the model in a folder, read as timm does for `local-dir:`."""
    try:
        args = resolve_model_input_args(f'local-dir:{folder}')
        cfg, saved = args['pretrained_cfg'], args.get('pretrained_model_args', {})
        if saved.get('num_classes', cfg['num_classes']) != cfg['num_classes']:
            raise ValueError('its config has two numbers of classes')  # timm would leave the classifier random
        if args['model_name'] != variant:
            saved = without_timm_eca(saved)
    except (TypeError, ValueError) as e:  # PretrainedCfg raises a TypeError for an unknown entry
        raise unreadable_weights(folder, e) from e
    return {**cfg, 'architecture': variant}, saved


def _names_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a pretrained config or an overlay names a source of weights that is no repository."""
    return any(cfg.get(key) for key in ('source', 'file', 'url', 'state_dict'))


def _name_weights(variant: str, pretrained_cfg: PretrainedCfgT, overlay: Mapping[str, Any]) -> str | None:
    """The `<model>.<tag>` of the weights, or None if the caller names their source."""
    if _names_source(overlay) or overlay.get('hf_hub_id'):
        return None
    if pretrained_cfg is None:
        return default_weights(variant)
    if isinstance(pretrained_cfg, str):
        return f'{variant}.{pretrained_cfg}'
    # This config comes from `hf-hub:`, `local-dir:`, or from the registry: timm's scripts read it there.
    cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else pretrained_cfg
    weights = f'{variant}.{cfg.tag}' if cfg.tag else variant
    registered = get_arch_pretrained_cfgs(variant).get(weights)
    if registered is None or _names_source(cfg.to_dict()) or cfg.hf_hub_id != registered.hf_hub_id:
        return None
    return weights
