"""What torch keeps private and fused norm and ECA rest on."""
import subprocess
import sys

import pytest

CODE = """
import torch
{change}
import timm, timm_eca
model = timm.create_model('eca_mobilenetv2_050').train()
model(torch.randn(2, 3, 32, 32)).sum().backward()
from timm_eca.layers import fused
timm_eca.set_fused()
print(fused._fused)
"""


@pytest.mark.parametrize(('change', 'fused'), [
    ('', 'True'),
    ('import torch._C._functorch as functorch; del functorch.is_legacy_batchedtensor', 'False'),
])
def test_private_names_may_go(change: str, fused: str):
    """In a later torch: one line in the log, and the modules are called."""
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(change=change)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fused
    assert done.stderr.count('Norm and ECA are not fused') == (fused == 'False')
