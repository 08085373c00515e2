"""Parameter groups for an optimizer: the attention learns faster than the rest of the network."""
from collections.abc import Collection
from typing import Any

import torch.nn as nn

from timm_eca.layers.norm_attn import named_norm_attn

__all__ = ['param_groups']


def param_groups(
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.05,
        attn_lr_scale: float = 10.0,
        layer_decay: float | None = None,
        no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups: timm's groups, and one for the attention of `add_attn`.

    ECA has few weights. They start near zero and must reach 0.1 to 1 for the gates to differ, but hardly move at the
    learning rate of the network. So the attention gets a higher rate, without weight decay or layer decay. For timm's
    optimizers::

        create_optimizer_v2(model, 'adamw', lr=lr, param_group_fn=partial(param_groups, lr=lr, weight_decay=0.05))

    Each group has its own `lr`, layer decay included, and none has timm's `lr_scale`. So the rates are right without a
    scheduler and with those of torch and timm. With timm's `warmup_lr` or `min_lr` all groups start from or end at that
    same rate.

    Args:
        model: A timm model, or one wrapped by DistributedDataParallel, `torch.compile` or the like.
        lr: Learning rate of the network.
        weight_decay: Weight decay of the network, except biases, norms and parameters that the model excludes.
        attn_lr_scale: The attention's learning rate is `lr` times this.
        layer_decay: Factor of the learning rate from each layer to the one before it.
        no_weight_decay_list: Names of more parameters without weight decay, with `*` for anything.

    Returns:
        The groups, the attention's first. The last has the classifier's learning rate.
    """
    # Not at the top: `import timm_eca` stays fast without them.
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay
    from timm.utils import unwrap_model
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
