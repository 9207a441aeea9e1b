from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_ops.layers import AddRMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_addition_and_torchs_norm(dtype):
    norm, plain = (cls(24, eps=1e-5) for cls in (AddRMSNorm, nn.RMSNorm))
    nn.init.normal_(norm.weight)
    plain.load_state_dict(norm.state_dict())
    norm, plain = norm.to(dtype), plain.to(dtype)
    x, delta = torch.randn(2, 2, 5, 24).to(dtype)
    bias = torch.randn(24).to(dtype)
    y, total = norm(x, delta, bias)
    wide = torch.promote_types(dtype, torch.float32)  # Rounded once.
    torch.testing.assert_close(total, (x.to(wide) + delta.to(wide) + bias.to(wide)).to(dtype))
    torch.testing.assert_close(y, plain(total))
    y, same = norm(x)
    assert same is x
    torch.testing.assert_close(y, plain(x))


def test_the_widest_dtype_wins():
    """The widest dtype wins, as in a stream of fp32 under autocast, to which products in bfloat16
    are added."""
    norm = AddRMSNorm(8)
    x, delta = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    y, total = norm(x, delta, torch.ones(8).bfloat16())
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, x + delta.float() + 1)
    assert norm(delta)[0].dtype == torch.float32
