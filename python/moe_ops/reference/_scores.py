"""The scores of routers in plain torch: the one table of them in Python.

References, the checks of the ops and the layers take names and values from here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import acc_dtype


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    # Far below zero it is exp(logit / 2): log(1 + exp(logit)) is zero from half as far on, and the
    # gradient of its root infinite.
    # Each branch is computed of logits it is meant for: zero times infinity would be a NaN.
    # Not clamp, whose gradient at -40 is 0 from torch 2.14 on.
    above = torch.where(logits < -40, -40.0, logits)
    softplus = F.softplus(above, threshold=40)  # above 40 it is the logit
    return torch.where(logits < -40, (logits.clamp(max=-40) / 2).exp(), softplus.sqrt())


# Scores [..., E] of logits [..., E]. All but the softmax are functions of one logit, and all are
# increasing ones.
SCORE_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def router_scores(router_logits: Tensor, score_func: str) -> Tensor:
    """Scores of logits [..., E], in fp32 (fp64 of fp64)."""
    return SCORE_FUNCS[score_func](router_logits.to(acc_dtype(router_logits.dtype)))
