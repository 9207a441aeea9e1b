"""Quantile balancing: the bias with which an expert gets its share, from a histogram.

An expert e is among the K of a token t when score[t, e] + bias[e] exceeds the threshold of t, the
(K + 1)-th largest of these sums. So it needs the bias r[t, e] = threshold[t] - score[t, e], and
with the K / E quantile of its r over a batch it would have been chosen by its share of the tokens.

Letters: T tokens, E experts, K experts a token, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Score functions whose values are in [0, 1], which bounds what the histogram has to cover.
BOUNDED_SCORES = ("softmax", "sigmoid")


def bias_range(expert_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of r, scalars: thresholds are in [min bias, max bias + 1], scores in [0, 1]."""
    return expert_bias.min() - 1, expert_bias.max() + 1


def count_required_bias(
    histogram: Tensor,
    scores: Tensor,
    expert_bias: Tensor,
    top_k: int,
    expert_mask: Tensor | None = None,
) -> None:
    """Adds r of all tokens to a histogram, in place and without waiting for the device.

    Args:
        histogram: [E, B] int64, bins of one width over `bias_range`.
        scores: [T, E] float in [0, 1].
        expert_bias: [E] float, with which the tokens were routed.
        top_k: K < E.
        expert_mask: [E] bool or None. Experts that are not allowed are not counted, nor are tokens
            for which there are K experts or fewer.
    """
    num_experts, bins = histogram.shape
    choice = scores + expert_bias
    if expert_mask is not None:
        choice = choice.masked_fill(~expert_mask, -torch.inf)
    threshold = choice.topk(top_k + 1, dim=1).values[:, -1:]
    low, high = bias_range(expert_bias)
    counts = threshold > -torch.inf
    required = threshold.masked_fill(~counts, 0.0) - scores
    index = ((required - low) / (high - low) * bins).clamp(0, bins - 1).long()
    index = index + torch.arange(num_experts, device=index.device) * bins
    if expert_mask is not None:
        counts = counts & expert_mask
    ones = counts.expand(index.shape).to(histogram.dtype)
    histogram.view(-1).scatter_add_(0, index.view(-1), ones.reshape(-1))


def solve_bias(histogram: Tensor, expert_bias: Tensor, top_k: int) -> Tensor:
    """The bias [E] that gives each expert its share of the tokens counted, with mean 0.

    It is the K / E quantile of an expert's r, interpolated inside its bin. An expert of which
    nothing was counted keeps its bias (up to the mean, which is taken off all), and where nothing
    was counted at all, all do.

    Args:
        histogram: [E, B], from `count_required_bias`. expert_bias: [E], as it was then.
        top_k: K.
    """
    num_experts, bins = histogram.shape
    cumulative = histogram.cumsum(1).double()
    total = cumulative[:, -1:]
    wanted = total * top_k / num_experts
    # The first bin at whose end the share is reached; a share above 0 is not reached in empty bins.
    index = torch.searchsorted(cumulative, wanted).clamp(max=bins - 1)
    inside = histogram.gather(1, index).double()
    before = cumulative.gather(1, index) - inside
    position = index + (wanted - before) / inside.clamp(min=1)
    low, high = bias_range(expert_bias.double())
    solved = (low + position * (high - low) / bins).squeeze(1)
    counted = total.squeeze(1) > 0
    solved = torch.where(counted, solved, expert_bias.double())
    solved = torch.where(counted.any(), solved - solved.mean(), solved)
    return solved.to(expert_bias.dtype)
