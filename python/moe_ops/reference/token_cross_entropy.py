from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype


def token_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target] of each token and its gradient; zeros where targets are -100."""
    scores = logits.to(acc_dtype(logits.dtype)).log_softmax(1)
    ignored = (targets == -100)[:, None]
    at = targets[:, None].long().masked_fill(ignored, 0)
    losses = -scores.gather(1, at).masked_fill(ignored, 0.0)[:, 0]
    grad = scores.exp().scatter_add(1, at, -torch.ones_like(scores[:, :1]))
    return losses, grad.masked_fill(ignored, 0.0).to(logits.dtype)
