"""Groups of parameters for an optimizer, with a group of its own for the attention."""
from collections.abc import Collection
from typing import Any

import torch.nn as nn

from timm_eca.layers.norm_attn import named_norm_attn

__all__ = ['param_groups']


def param_groups(
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.05,
        attn_lr_scale: float = 1.0,
        layer_decay: float | None = None,
        no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups: timm's groups, and one for the attention of `add_attn`.

    The attention gets no weight decay and no layer decay. A learning rate above that of the network needs hundreds of
    steps: fast gates change the inputs of later norms, and the running statistics of these norms fall behind. For
    timm's optimizers::

        create_optimizer_v2(model, 'adamw', lr=lr, param_group_fn=partial(param_groups, lr=lr, weight_decay=0.05))

    Each group has its own `lr`, which includes layer decay, and no `lr_scale` of timm. So the rates are right without a
    scheduler, and with the schedulers of torch and timm. But all groups start at timm's `warmup_lr` and end at its
    `min_lr`.

    Args:
        model: A timm model, or one wrapped by DistributedDataParallel, `torch.compile` or the like.
        lr: Learning rate of the network.
        weight_decay: Weight decay of the network. Biases, norms and the parameters that the model excludes get none.
        attn_lr_scale: The attention's learning rate is `lr` times this.
        layer_decay: Factor of the learning rate from each layer to the one before it.
        no_weight_decay_list: Names of more parameters without weight decay, with `*` as a wildcard.

    Returns:
        The groups. The first is the attention's, the last has the classifier's learning rate.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay
    from timm.utils import unwrap_model  # `import timm` imports neither

    model = unwrap_model(model)
    attention = {id(p): p for _, place in named_norm_attn(model) for p in place.attn.parameters() if p.requires_grad}
    excluded = {*no_weight_decay_list, *getattr(model, 'no_weight_decay', set)()}
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay)
    for group in groups:
        group['params'] = [p for p in group['params'] if id(p) not in attention]
        group['lr'] = lr * group.pop('lr_scale', 1.0)
    groups.insert(0, {'params': list(attention.values()), 'lr': lr * attn_lr_scale, 'weight_decay': 0.0})
    return [group for group in groups if group['params']]
