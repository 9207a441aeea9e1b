"""Scores of routers in plain torch, the only table of them in Python.

References, the checks of the ops and the layers use its names and values.
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
    # Far below zero it is exp(logit / 2): log(1 + exp(logit)) underflows at half that distance, and
    # the gradient of its root is infinite. Each branch only gets logits in its own range: zero
    # times infinity would be NaN. clamp is not used, because its gradient at -40 is 0 from torch
    # 2.14 on.
    above = torch.where(logits < -40, -40.0, logits)
    softplus = F.softplus(above, threshold=40)  # above 40 it is the logit
    return torch.where(logits < -40, (logits.clamp(max=-40) / 2).exp(), softplus.sqrt())


# Scores [..., E] of logits [..., E]. All except softmax depend on one logit, and all are
# increasing.
SCORE_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def router_scores(router_logits: Tensor, score_func: str) -> Tensor:
    """Returns the scores of logits [..., E], in fp32 (fp64 for fp64)."""
    return SCORE_FUNCS[score_func](router_logits.to(acc_dtype(router_logits.dtype)))
