"""Quantile balancing: computes, from a histogram, the bias that balances each expert's load.

Expert e is among the K of token t if score[t, e] + bias[e] exceeds the threshold of t, the (K +
1)-th largest of these sums. It therefore needs the bias r[t, e] = threshold[t] - score[t, e]. With
the K / E quantile of its r over a batch as its bias, it would have been selected for its share of
the tokens.

Letters: T tokens, E experts, K experts per token, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Score functions with values in [0, 1], which bounds the range of the histogram.
BOUNDED_SCORES = ("softmax", "sigmoid")


def bias_range(expert_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scalar bounds of r: thresholds are in [min bias, max bias + 1], scores in [0, 1]."""
    return expert_bias.min() - 1, expert_bias.max() + 1


def count_required_bias(
    histogram: Tensor,
    scores: Tensor,
    expert_bias: Tensor,
    top_k: int,
    expert_mask: Tensor | None = None,
) -> None:
    """Adds r of all tokens to a histogram, in place and without a device sync.

    Args:
        histogram: [E, B] int64; bins of equal width over `bias_range`.
        scores: [T, E] float in [0, 1].
        expert_bias: [E] float, used to route the tokens.
        top_k: K < E.
        expert_mask: [E] bool or None. Masked experts are not counted, nor are tokens with K or
            fewer allowed experts.
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
    """Returns the bias [E], with mean 0, that gives each expert its share of the counted tokens.

    The bias is the K / E quantile of an expert's r, interpolated within its bin. An expert without
    counts keeps its bias (minus the mean subtracted from all); without any counts, all experts do.

    Args:
        histogram: [E, B], from `count_required_bias`.
        expert_bias: [E], its value when the histogram was counted.
        top_k: K.
    """
    num_experts, bins = histogram.shape
    cumulative = histogram.cumsum(1).double()
    total = cumulative[:, -1:]
    wanted = total * top_k / num_experts
    # The first bin whose cumulative count reaches the share; a positive share is never reached in
    # an empty bin.
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
