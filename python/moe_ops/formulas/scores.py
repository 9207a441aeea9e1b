"""Scores of router logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype

# Below it, softplus(x) equals exp(x) in float64.
_FAR_BELOW = -40.0


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    """Computes sqrt(log(1 + exp(x))), with a finite gradient at any finite x."""
    far = logits < _FAR_BELOW
    # Each branch gets logits at which its gradient is finite: where() multiplies the gradient of
    # the other branch by zero.
    root = (-F.logsigmoid(-torch.where(far, 0.0, logits))).sqrt()
    return torch.where(far, torch.where(far, 0.5 * logits, 0.0).exp(), root)


# Functions of logits [..., E] that increase with each expert's own logit. All except softmax treat
# experts independently.
SCORE_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def router_scores(router_logits: Tensor, score_func: str) -> Tensor:
    """Returns the scores of logits [..., E] in float32 (float64 for float64)."""
    return SCORE_FUNCS[score_func](router_logits.to(accumulate_dtype(router_logits.dtype)))
