"""What torch keeps private and fused norm and ECA rest on."""
import logging

import pytest
import torch
from helpers.forked import call, import_anew
from timm.models import create_model

import timm_eca


@pytest.mark.parametrize('gone', [False, True])
def test_private_names_may_go(gone: bool):
    """In a later torch: one line in the log, and the modules are called."""
    def use() -> int:
        logging.basicConfig(format='%(message)s', force=True)
        import_anew()
        if gone:
            del torch._C._functorch.is_legacy_batchedtensor
        import timm_eca
        from timm_eca.layers import fused

        create_model('eca_mobilenetv2_050').train()(torch.randn(2, 3, 32, 32)).sum().backward()
        timm_eca.set_fused()
        print(fused._fused)
        return 0

    status, printed = call(use)
    assert status == 0, printed
    assert printed.splitlines()[-1] == str(not gone)
    assert printed.count('Norm and ECA are not fused') == gone
    assert timm_eca.layers.fused._fused
