"""Breaks the PTX of the weight gradient with row factors (tests/helpers/ptx_mutants.py). Run by
test_moe_linear_reduce.py."""

from __future__ import annotations

import torch
from tests.helpers.ptx_mutants import PASS, TRY_WAIT, Case, Mutation, main, sub
from tests.helpers.routing import Routing

# The barrier after the fence is not among them: for the simulator a product of a warpgroup begins
# when all four warps have issued it, and each has written its lines by then.
MUTANTS: dict[str, Mutation] = {
    "turn wait dropped": sub(TRY_WAIT, PASS, 0),
    "full wait dropped": sub(TRY_WAIT, PASS, 1),
    "scaled lines without a proxy fence": sub(r"fence\.proxy\.async\.shared::cta;", ""),
    "a piece not scaled": sub(r"st\.shared\.v4\.\w+ \[%r\d+\+?\d*\], [^;]*;", "", 3),
    "factor of another row": sub(r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]", r"\1+4]", -1),
}


def make_case() -> Case:
    """Rows of two experts, sums longer than the ring, several tiles a block. The module also holds
    the weight gradients without factors; a call in fp32 launches what comes before the kernel."""
    ids = Routing(600, 2, 2, "dropped").ids()
    h, w, grad = torch.randn(600, 2, 136), torch.randn(2, 264, 136), torch.randn(600, 264)
    weights = torch.rand(600, 2) + 0.1

    def grad_w(dtype: torch.dtype) -> torch.Tensor:
        operands = (t.to(dtype) for t in (grad, h, w))
        return torch.ops.moe_ops.moe_linear_reduce_bwd(
            *operands, weights, ids, None, False, True, False, False
        )[1]

    return Case(
        run=lambda: grad_w(torch.bfloat16),
        kernel=("sm90_scaled_wgrad_kernel",),
        prepare=lambda: grad_w(torch.float32),
    )


if __name__ == "__main__":
    main({name: (mutate,) for name, mutate in MUTANTS.items()}, make_case)
