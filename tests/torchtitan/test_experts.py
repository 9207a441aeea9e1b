"""moe_ops.torchtitan: experts of torchtitan with an override against the stock experts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
ours = pytest.importorskip("moe_ops.torchtitan", reason="torchtitan cannot be imported")

from torchtitan.models.common.moe import GroupedExperts  # noqa: E402
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts  # noqa: E402

pytestmark = pytest.mark.cpu_only


def run(experts, x, counts, grad):
    x = x.clone().requires_grad_()
    used = int(counts.sum())  # torchtitan leaves gradients of later rows of x undefined
    y = experts(x, counts)[:used]
    grad_x, *others = torch.autograd.grad(y.float(), [x, *experts.parameters()], grad)
    return [t.double() for t in (y, grad_x[:used], *others)]


@pytest.mark.parametrize("stock", [GroupedExperts, GptOssGroupedExperts])
@pytest.mark.parametrize("override", ["grouped_gemm", "moe_ffn"])
def test_outputs_and_gradients_are_those_of_the_stock_experts(stock, override):
    config = stock.Config(dim=64, hidden_dim=96, num_experts=4)
    want = config.build()
    for p in want.parameters():
        torch.nn.init.normal_(p, std=0.1)
    got = getattr(ours, override)(config).build()
    got.load_state_dict(want.state_dict())  # strict: names and shapes are the same
    counts = torch.tensor([10, 0, 25, 12])
    x, grad = torch.randn(50, 64), torch.randn(47, 64)  # the last three rows have no expert
    # Stock experts round four times to bfloat16 (unit roundoff 2^-9) between x and y, and as often
    # on the way back; roundings of independent elements add up like a random walk.
    bound = 4 * 2.0**-9 if override == "moe_ffn" else 1e-6
    for a, b in zip(run(got, x, counts, grad), run(want, x, counts, grad), strict=True):
        assert float((a - b).norm()) <= bound * float(b.norm())


@pytest.mark.parametrize("override", ["grouped_gemm", "moe_ffn"])
def test_other_experts_are_refused(override):
    class Other(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

    with pytest.raises(ValueError, match=rf"torchtitan\.{override}: cfg must be .*, got .*Other"):
        getattr(ours, override)(Other.Config(dim=8, hidden_dim=8, num_experts=2))
