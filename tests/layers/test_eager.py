"""The private names of torch that fused norm and ECA need."""
import logging

import torch
import torch.nn as nn
from helpers.forked import call, import_anew


def test_private_names_may_go():
    """If a later torch lacks one: one line in the log, and the modules are called."""
    def use() -> int:
        logging.basicConfig(format='%(message)s', force=True)
        import_anew()
        del torch._C._functorch.is_legacy_batchedtensor
        import timm_eca
        from timm_eca.layers.norm_attn import NormAttn

        timm_eca.set_fused(True)
        out = NormAttn(nn.BatchNorm2d(8), timm_eca.EfficientChannelAttention())(torch.randn(2, 8, 4, 4))
        out.sum().backward()
        print('FusedNormEca' in out.grad_fn.name())
        return 0

    status, printed = call(use)
    assert status == 0, printed
    assert printed.splitlines()[-1] == 'False'
    assert printed.count('Norm and ECA are not fused') == 1
