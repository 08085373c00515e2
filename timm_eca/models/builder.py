"""Builds the registered models: a timm model, ECA put in, weights loaded, wrapped for features where asked."""
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg, build_model_with_cfg, create_model, get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint,
)

from timm_eca.layers.attention import AttnLayer
from timm_eca.models.checkpoint_filter import checkpoint_filter_fn
from timm_eca.models.insert import KernelSizes, insert_attn
from timm_eca.weights.model_folder import WEIGHTS_FILE
from timm_eca.weights.official import TAG
from timm_eca.weights.store import (
    HUB_ERRORS, fetch_weights, find_local_weights, hub_id, names_source, unknown_tag, unreadable_weights,
    weights_not_found,
)

__all__ = ['base_cfgs', 'build_eca_model']

PretrainedCfgT: TypeAlias = str | Mapping[str, Any] | PretrainedCfg | None


def build_eca_model(
        variant: str,
        base: str,
        default_kernel_sizes: KernelSizes,
        pretrained: bool = False,
        pretrained_cfg: PretrainedCfgT = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        kernel_sizes: KernelSizes | None = None,
        attn_layer: AttnLayer | None = None,
        features_in_base: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        variant: Name of the model.
        base: Name of the timm model that ECA is put in.
        default_kernel_sizes: ECA's kernel sizes where neither the caller nor the config of the weights says them.
        pretrained: Load the weights: from the weights directory, else the Hub, else (the authors') Google Drive.
        pretrained_cfg: Tag of the weights, or their config. A tag may be one that only the weights directory has.
        pretrained_cfg_overlay: Entries that go before those of the config.
        kernel_sizes: ECA's kernel sizes: one for each stage, one for all stages, or 'adaptive' (paper, eq. 12).
        attn_layer: The attention: `'eca'`, the default, or another of `timm_eca.layers.attention.ATTENTIONS`.
        features_in_base: With `features_only=True` the base model is built as a feature extractor of its own kind.
        **kwargs: Arguments of the base model and of `timm.models.build_model_with_cfg`.

    Raises:
        WeightsNotFoundError: No source has the weights.
        ValueError: The kernel sizes or the checkpoint are not accepted.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    weights = _name_weights(variant, pretrained_cfg, overlay)
    repo_id = fetched = None
    if weights is not None:
        registered = get_arch_pretrained_cfgs(variant).get(weights)
        official = registered is not None and registered.tag == TAG
        if pretrained or registered is None:
            folder = find_local_weights(weights)
            if folder is None and official:
                from timm_eca.conversion.download import fetch_official  # takes longer to import than all the rest
                fetched = fetch_official(weights, kwargs.get('cache_dir'))
                folder = fetched if fetched.is_dir() else None
            if folder is not None:  # its config's arguments and preprocessing are defaults below the caller's
                try:
                    return create_model(
                        f'local-dir:{folder}',
                        pretrained=pretrained,
                        pretrained_cfg_overlay=overlay,
                        kernel_sizes=kernel_sizes,
                        attn_layer=attn_layer,
                        **kwargs,
                    )
                except (SafetensorError, OSError) as e:
                    raise unreadable_weights(folder, e) from None
        if registered is None:
            raise unknown_tag(weights, list(get_arch_pretrained_cfgs(variant)))
        if official:
            # $TIMM_ECA_HUB_ORG may have been set since the registration; timm looks for a pickle unless told the file.
            overlay.update(hf_hub_id=hub_id(weights), hf_hub_filename=WEIGHTS_FILE)
        repo_id = overlay.get('hf_hub_id') or registered.hf_hub_id

    base_features = features_in_base and bool(kwargs.pop('features_only', False))
    strict = kwargs.pop('pretrained_strict', True)
    if kernel_sizes is None:
        kernel_sizes = default_kernel_sizes
    try:
        if pretrained and repo_id and fetched is None:
            fetched = fetch_weights(repo_id, kwargs.get('cache_dir'))
        if fetched is not None:
            overlay['file'] = str(fetched)  # this very file, and no second question to the Hub
        model = build_model_with_cfg(
            partial(_build_with_attn, base, attn_layer or 'eca', kernel_sizes, base_features),
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=partial(_filter_checkpoint, base, base_features),
            pretrained_strict=strict and not base_features,  # they have no head; the filter checks the rest
            **kwargs,
        )
    except (*HUB_ERRORS, OSError, SafetensorError) as e:  # type: ignore[misc]
        if weights is None or not repo_id:
            raise
        raise weights_not_found(weights, repo_id, e, fetched) from None
    if fetched is not None:
        for module in model.modules():  # a model within a feature extractor has a config of its own
            cfg: Any = getattr(module, 'pretrained_cfg', None)
            if isinstance(cfg, dict):
                cfg.pop('file', None)  # the cache is this machine's
    if base_features:
        no_head = {k: v for k, v in model.pretrained_cfg.items() if k not in ('num_classes', 'classifier')}
        model.pretrained_cfg = model.default_cfg = no_head
    return model


def base_cfgs(variant: str, base: str) -> dict[str, PretrainedCfg]:
    """The pretrained configs of a timm model, as those of warm starts of the model with ECA, for `default_cfgs`."""
    # As timm's module has them: what its registry gives are copies, which take most of the time of the import.
    cfgs = sys.modules[model_entrypoint(base).__module__].default_cfgs[base].cfgs
    found = {}
    for tag, cfg in cfgs.items():
        if cfg.hf_hub_id == 'timm/':  # which timm completes by the name of the model
            cfg = replace(cfg, hf_hub_id=f'timm/{base}.{tag}')
        found[f'{variant}.{tag}' if tag else variant] = cfg
    return found


def _filter_checkpoint(
        base: str,
        drop_head: bool,
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
) -> dict[str, torch.Tensor]:
    # What timm does to checkpoints of the base model: foreign names, position embeddings of another size.
    base_filter = getattr(sys.modules[model_entrypoint(base).__module__], 'checkpoint_filter_fn', None)
    if base_filter is not None:
        state_dict = base_filter(state_dict, model)
    return checkpoint_filter_fn(state_dict, model, drop_head)


def _build_with_attn(
        base: str,
        attn_layer: AttnLayer,
        kernel_sizes: KernelSizes,
        base_features: bool,
        **kwargs: Any,
) -> nn.Module:
    if base_features:
        kwargs['features_only'] = True
    return insert_attn(model_entrypoint(base)(**kwargs), attn_layer, kernel_sizes)


def _name_weights(variant: str, pretrained_cfg: PretrainedCfgT, overlay: Mapping[str, Any]) -> str | None:
    """The `<model>.<tag>` of the weights, or None where the caller says where they are."""
    if names_source(overlay) or overlay.get('hf_hub_id'):
        return None
    if isinstance(pretrained_cfg, str):
        return f'{variant}.{pretrained_cfg}'
    if pretrained_cfg is None:
        tag = get_pretrained_cfg(variant, allow_unregistered=False).tag
    else:  # from `hf-hub:` or `local-dir:`, or the registered one, which timm's scripts resolve beforehand
        cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else pretrained_cfg
        tag = cfg.tag
        registered = get_arch_pretrained_cfgs(variant).get(f'{variant}.{tag}' if tag else variant)
        if registered is None or names_source(cfg.to_dict()) or cfg.hf_hub_id != registered.hf_hub_id:
            return None
    return f'{variant}.{tag}' if tag else variant
