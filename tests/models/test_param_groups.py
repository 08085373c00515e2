"""`timm_eca.param_groups`: the learning rate of the attention, with optimizers and schedulers of timm and torch."""
from functools import partial

import pytest
import torch
import torch.nn as nn
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_eca import add_attn, param_groups

MODEL = 'eca_mobilenetv2_050'


def _attention(model: nn.Module) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if '.attn.' in name}


def _optimizer(model: nn.Module, opt: str = 'adamw', **kwargs: float) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        model, opt, lr=1e-3, weight_decay=0.05, param_group_fn=partial(param_groups, lr=1e-3, **kwargs))


@pytest.mark.parametrize('opt', ['adamw', 'muon', 'lookahead_adamw'])
@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_the_attention_is_a_group_of_its_own(opt: str, layer_decay: float | None):
    model = create_model(MODEL, num_classes=3)
    groups = _optimizer(model, opt, attn_lr_scale=30, layer_decay=layer_decay).param_groups
    assert {id(p) for p in groups[0]['params']} == _attention(model) != set()
    assert (groups[0]['lr'], groups[0]['weight_decay']) == (pytest.approx(0.03), 0)
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(map(id, model.parameters()))  # each once
    classifier = next(group for group in groups if any(p is model.classifier.weight for p in group['params']))
    assert classifier['lr'] == groups[-1]['lr'] == pytest.approx(1e-3)
    assert classifier['weight_decay'] == 0.05
    assert (min(group['lr'] for group in groups) < 9e-4) == (layer_decay is not None)


@pytest.mark.parametrize('sched', ['cosine', 'step', 'torch'])
def test_schedulers_keep_the_factor(sched: str):
    optimizer = _optimizer(create_model(MODEL), 'sgd', attn_lr_scale=10, layer_decay=0.5)
    if sched == 'torch':
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    else:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=sched, num_epochs=10, decay_epochs=3, min_lr=0, warmup_lr=0, warmup_epochs=2)
    optimizer.step()
    rates = []
    for epoch in range(1, 9):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[-1]['lr'])
        assert optimizer.param_groups[0]['lr'] == pytest.approx(10 * rates[-1])
    assert len(set(rates)) > 2


def test_models_without_trainable_attention_and_wrapped_ones():
    plain = create_model('mobilenetv2_050', num_classes=3)
    assert {group['lr'] for group in param_groups(plain, lr=0.1)} == {0.1}
    se = add_attn(plain, 'se')
    assert {id(p) for p in param_groups(nn.DataParallel(torch.compile(se)), lr=0.1)[0]['params']} == _attention(se)
    for p in se.parameters():
        p.requires_grad_(id(p) not in _attention(se))
    assert {group['lr'] for group in param_groups(se, lr=0.1)} == {0.1}


def test_the_attention_learns_at_the_networks_rate_by_default():
    first, *_ = param_groups(create_model(MODEL), lr=0.1, layer_decay=0.5)
    assert (first['lr'], first['weight_decay']) == (0.1, 0)


def test_names_without_weight_decay():
    vit = create_model('test_vit')
    for names in ((), ('head.*',)):
        kept = {id(p) for g in param_groups(vit, 0.1, no_weight_decay_list=names) if g['weight_decay'] == 0
                for p in g['params']}
        assert id(vit.pos_embed) in kept  # as the model itself says
        assert (id(vit.head.weight) in kept) == bool(names)
