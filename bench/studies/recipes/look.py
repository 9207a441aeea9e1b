"""LOOK: supervised pre-training that asks an example's nearest neighbors alone to be of its class,
so that a class may be of several kinds.

Letters: N examples, M examples of a memory, D features, k neighbors.

Source: Feng et al. 2022 (Rethinking Supervised Pre-Training for Better Downstream Transferring,
ICLR, arXiv 2110.06014).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def look_loss(
    z: Tensor,
    y: Tensor,
    memory: Tensor,
    memory_y: Tensor,
    k: int,
    *,
    temperature: float = 0.1,
    own: Tensor | None = None,
) -> Tensor:
    """Mean over examples of -log of the share of its class among its k nearest of the memory, each
    weighted by exp(cosine / temperature). The example itself is left out.

    Where none of the k is of its class, the nearest one that is takes part beside them, so that the
    loss is finite; an example whose class the memory does not have is left out of the mean.

    Args:
        z: [N, D], of any length. y: [N] classes.
        memory: [M, D]. memory_y: [M].
        k: neighbors, at least 1; all of the memory where it holds fewer. With k >= M this is
            neighborhood components analysis.
        own: [N] the place in the memory of each example itself, -1 where it is not there; None:
            nowhere.

    Returns:
        A scalar; 0 where no class is in the memory.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"look_loss: k must be at least 1 and temperature above 0, got {k} and {temperature}."
        )
    scores = F.normalize(z, dim=1) @ F.normalize(memory, dim=1).T / temperature
    if own is not None:
        there = (own >= 0).nonzero()[:, 0]
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        hidden[there, own[there]] = True
        scores = scores.masked_fill(hidden, -torch.inf)
    same = (memory_y[None] == y[:, None]) & (scores > -torch.inf)
    near = torch.zeros_like(same)
    near.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True)
    nearest_same = scores.masked_fill(~same, -torch.inf).argmax(1, keepdim=True)
    alone = ~(near & same).any(1, keepdim=True) & same.any(1, keepdim=True)
    near |= torch.zeros_like(near).scatter_(1, nearest_same, alone)
    known = same.any(1)
    if not bool(known.any()):
        return z.sum() * 0.0
    scores, near, same = scores[known], near[known], same[known]
    every = scores.masked_fill(~near, -torch.inf).logsumexp(1)
    return (every - scores.masked_fill(~(near & same), -torch.inf).logsumexp(1)).mean()


class Memory:
    """The last M features and classes, first in first out.

    Attributes:
        z: [m, D], m <= M, without gradient. y: [m].
    """

    def __init__(self, size: int, num_features: int) -> None:
        self.size = size
        self.z = torch.zeros(0, num_features)
        self.y = torch.zeros(0, dtype=torch.long)

    def push(self, z: Tensor, y: Tensor) -> None:
        """Adds [N, D] and [N] behind what is there."""
        self.z = torch.cat([self.z.to(z), z.detach()])[-self.size :]
        self.y = torch.cat([self.y.to(y), y])[-self.size :]


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, rate: float = 0.01) -> None:
    """Momentum encoder: parameters of `target` go by `rate` towards those of `online`; buffers are
    copied."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)
    for old, new in zip(target.buffers(), online.buffers(), strict=True):
        old.copy_(new)
