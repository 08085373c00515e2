"""Builds the registered models: a timm model, ECA put in, weights loaded, wrapped for features where asked."""
import sys
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any, TypeAlias

import torch.nn as nn
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg, build_model_with_cfg, create_model, get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint,
)

from timm_eca.layers.attention import AttnLayer
from timm_eca.models.checkpoint_filter import checkpoint_filter_fn
from timm_eca.models.insert import KernelSizes, insert_attn
from timm_eca.weights.model_folder import WEIGHTS_FILE
from timm_eca.weights.official import OFFICIAL, PAPER_ID, PAPER_NAME, REPOSITORY, TAG
from timm_eca.weights.store import (
    HUB_ERRORS, WeightsNotFoundError, fetch_weights, find_local_weights, hub_id, unreadable_weights, weights_dir,
    weights_not_found,
)

__all__ = ['build_eca_model', 'eca_cfgs']

PretrainedCfgT: TypeAlias = str | Mapping[str, Any] | PretrainedCfg | None

# How timm makes feature extractors of its families: these are models of a kind of their own, ...
_OWN_FEATURES = ('hrnet', 'efficientnet', 'mobilenetv3', 'hardcorenas')
# ... and of all others it wraps the whole model, with these settings.
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


_UNUSED_TENSORS = ('dla', 'mobilenetv5')  # families of which timm's weights have tensors that no model needs


def build_eca_model(
        variant: str,
        base: str,
        pretrained: bool = False,
        pretrained_cfg: PretrainedCfgT = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        kernel_sizes: KernelSizes | None = None,
        attn_layer: AttnLayer | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        variant: Name of the model.
        base: Name of the timm model that ECA is put in.
        pretrained: Load the weights: from the weights directory, else the Hub, else (the authors') Google Drive.
        pretrained_cfg: Tag of the weights, or their config. A tag may be one that only the weights directory has.
        pretrained_cfg_overlay: Entries that go before those of the config.
        kernel_sizes: ECA's kernel sizes: one for each stage, one for all stages, or 'adaptive' (paper, eq. 12). By
            default what the config of the weights says, else the authors' of their models, and 'adaptive' of others.
        attn_layer: The attention: `'eca'`, the default, or another of `timm_eca.layers.attention.ATTENTIONS`.
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
                except (SafetensorError, OSError) as e:  # of the tensors, which the check does not read
                    raise unreadable_weights(folder, e) from None
        if registered is None:
            known = ', '.join(get_arch_pretrained_cfgs(variant))
            raise WeightsNotFoundError(
                f'Unknown weights {weights}: there are {known}, and no folder {weights_dir() / weights}.')
        if official:
            # $TIMM_ECA_HUB_ORG may have been set since the registration; timm looks for a pickle unless told the file.
            overlay.update(hf_hub_id=hub_id(weights), hf_hub_filename=WEIGHTS_FILE)
        repo_id = overlay.get('hf_hub_id') or registered.hf_hub_id

    family = model_entrypoint(base).__module__.rpartition('.')[2]
    base_features = (  # unless the caller says how: timm wraps the whole model then
        family in _OWN_FEATURES and not kwargs.keys() & {'feature_cls', 'feature_cfg'}
        and bool(kwargs.pop('features_only', False)))
    if family in _FEATURE_CFGS:
        kwargs.setdefault('feature_cfg', dict(_FEATURE_CFGS[family]))
    strict = kwargs.pop('pretrained_strict', True)
    sizes = kernel_sizes
    if sizes is None:
        sizes = OFFICIAL[variant].kernel_sizes if variant in OFFICIAL else 'adaptive'

    def build(**kwargs: Any) -> nn.Module:
        if base_features:
            kwargs['features_only'] = True
        return insert_attn(model_entrypoint(base)(**kwargs), attn_layer or 'eca', sizes)

    try:
        if pretrained and repo_id and fetched is None:
            fetch_weights(repo_id, kwargs.get('cache_dir'))  # checked; timm takes them from the cache
        model = build_model_with_cfg(
            build,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=partial(
                checkpoint_filter_fn, base=base, drop_head=base_features, strict=strict),
            # Features have no head. The filter checks that nothing is missing.
            pretrained_strict=strict and not base_features and family not in _UNUSED_TENSORS,
            **kwargs,
        )
    except (*HUB_ERRORS, OSError, SafetensorError) as e:  # type: ignore[misc]
        if weights is None or not repo_id:
            raise
        raise weights_not_found(weights, repo_id, e) from None
    if base_features:
        no_head = {k: v for k, v in model.pretrained_cfg.items() if k not in ('num_classes', 'classifier')}
        model.pretrained_cfg = model.default_cfg = no_head
    return model


def eca_cfgs(variant: str, base: str) -> dict[str, PretrainedCfg]:
    """The pretrained configs of a model, for `default_cfgs`: of the authors' weights, and of timm's as warm starts."""
    # As timm's module has them: what its registry gives are copies, which take most of the time of the import.
    cfgs = sys.modules[model_entrypoint(base).__module__].default_cfgs[base].cfgs
    found = {}
    if variant in OFFICIAL:
        plain, name = cfgs[next(iter(cfgs))], f'{variant}.{TAG}'
        found[name] = PretrainedCfg(
            hf_hub_id=hub_id(name), pool_size=(7, 7), interpolation='bilinear', first_conv=plain.first_conv,
            classifier=plain.classifier, license='mit', origin_url=REPOSITORY, paper_name=PAPER_NAME,
            paper_ids=PAPER_ID)
    for tag, cfg in cfgs.items():
        if cfg.hf_hub_id == 'timm/':  # which timm completes by the name of the model
            cfg = copy(cfg)  # in a tenth of the time of dataclasses.replace
            cfg.hf_hub_id = f'timm/{base}.{tag}'
        found[f'{variant}.{tag}' if tag else variant] = cfg
    return found


def _names_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a pretrained config, or an overlay over one, names another source of weights than a repository."""
    return any(cfg.get(key) for key in ('source', 'file', 'url', 'state_dict'))


def _name_weights(variant: str, pretrained_cfg: PretrainedCfgT, overlay: Mapping[str, Any]) -> str | None:
    """The `<model>.<tag>` of the weights, or None where the caller says where they are."""
    if _names_source(overlay) or overlay.get('hf_hub_id'):
        return None
    if isinstance(pretrained_cfg, str):
        return f'{variant}.{pretrained_cfg}'
    if pretrained_cfg is None:
        tag = get_pretrained_cfg(variant, allow_unregistered=False).tag
    else:  # from `hf-hub:` or `local-dir:`, or the registered one, which timm's scripts resolve beforehand
        cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else pretrained_cfg
        tag = cfg.tag
        registered = get_arch_pretrained_cfgs(variant).get(f'{variant}.{tag}' if tag else variant)
        if registered is None or _names_source(cfg.to_dict()) or cfg.hf_hub_id != registered.hf_hub_id:
            return None
    return f'{variant}.{tag}' if tag else variant
