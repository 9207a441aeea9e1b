"""Logits for the tests of routers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype, kind: str = "normal"):
    """Router logits: normal, wide (some probabilities underflow), tied (few distinct values)."""
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    if kind == "wide":
        logits = logits * 40
    elif kind == "tied":
        logits = logits.round()
    elif kind == "skewed":
        logits = logits - torch.arange(1, num_experts + 1, dtype=torch.float64).log() * 2
    return logits.to(dtype)


def decided_logits(make: Callable[[], Tensor], decide: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Logits whose choice survives rounding: redrawn until `decide` agrees with itself.

    `decide(logits64, factor)` returns the ids after scaling every operand by `factor`; scaling
    keeps exact ties tied, so tie-breaking is still exercised.
    """
    for _ in range(200):
        logits = make()
        wide = logits.double()
        ids = decide(wide, 1.0)
        if all(torch.equal(ids, decide(wide, 1 + d)) for d in (-4e-6, -1e-6, 1e-6, 4e-6)):
            return logits
    raise AssertionError("no logits found whose choice is stable against rounding")


def logit_spread(logits: Tensor) -> Tensor:
    """[T, 1] factor of a softmax bound: exp's argument carries the rounding of logit - maximum."""
    wide = logits.detach().double()
    if wide.numel() == 0:
        return wide[:, :1]
    finite = torch.where(wide.isfinite(), wide, 0)
    return 1 + (finite.amax(1, keepdim=True) - finite.amin(1, keepdim=True)) / 8
