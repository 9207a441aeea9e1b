"""Curricula for ranking: easy answers first, as a cheap first ranker tells easy from hard.

Letters: N answers, or pairs of one relevant and one other answer.

Source: MacAvaney et al. 2020 (Training Curricula for Open Domain Answer Re-Ranking, SIGIR, arXiv
2004.14269).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------ how relevant an answer looks, [0, 1]


def reciprocal_rank(ranks: Tensor) -> Tensor:
    """1 / rank, of ranks from 1 on."""
    return 1 / ranks.to(torch.get_default_dtype())


def normalized_score(scores: Tensor) -> Tensor:
    """Scores of each query [..., N] moved to [0, 1]; 0.5 where all are alike."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low).clamp(min=1e-30), 0.5)


def score_distribution(scores: Tensor, sample: Tensor) -> Tensor:
    """Share of the distribution of `sample` [M] that lies below each score: that of a sum of
    normal kernels with Scott's width, deviation * M^(-1/5)."""
    width = (sample.std() * len(sample) ** -0.2).clamp(min=1e-12)
    return torch.special.ndtr((scores[..., None] - sample) / width).mean(-1)


# -------------------------------------------------------------------------------- easiness, weight


def pointwise_easiness(seeming: Tensor, relevant: Tensor) -> Tensor:
    """`seeming` of relevant answers, 1 - `seeming` of others: 1 is easiest."""
    return torch.where(relevant.bool(), seeming, 1 - seeming)


def pairwise_easiness(relevant: Tensor, other: Tensor) -> Tensor:
    """(relevant - other + 1) / 2 of how relevant the two of a pair look."""
    return (relevant - other + 1) / 2


def curriculum_weight(easiness: Tensor, epoch: float, end: float, *, anti: bool = False) -> Tensor:
    """D (1 - e / m) + e / m in epoch e < m, then 1: from easiness alone to equal weights.

    Args:
        epoch: e, from 0 on. end: m, 20 in the paper.
        anti: hardest first, 1 - D in the place of D: the control.
    """
    easiness = 1 - easiness if anti else easiness
    done = min(epoch / end, 1.0) if end > 0 else 1.0
    return easiness * (1 - done) + done


# -------------------------------------------------------------------------------------------- loss


def pairwise_loss(relevant: Tensor, other: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over pairs of weight * -log softmax of the relevant answer's score among the two.

    Each pair has its own weight, as the paper has it; the authors' code multiplies the mean loss by
    the mean weight.

    Args:
        relevant, other: [N] scores of a model. weight: [N], None: 1.
    """
    losses = F.softplus(other - relevant)
    return (losses if weight is None else weight * losses).mean()


def pointwise_loss(scores: Tensor, relevant: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over answers of weight * binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(scores, relevant.to(scores.dtype), weight)
