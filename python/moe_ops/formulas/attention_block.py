"""Attention of a few new tokens over the positions of a cache, in which masked positions have no
effect.

Letters: B sequences, S new tokens, m groups of g heads, d features, L positions up to the last new
token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen_positions(
    mask: Tensor | None, start: int, length: int, device: torch.device
) -> Tensor | None:
    """Returns True where a query attends to a position, [B or 1, 1, S, L]; None if all attend to
    all."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask != -torch.inf
    if length == 1:
        return None
    last = torch.arange(start, start + length, device=device)
    return (torch.arange(start + length, device=device) <= last[:, None])[None, None]


def attend(
    scores: Tensor,
    values: Tensor,
    mask: Tensor | None,
    start: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mixes values [B, m, L, d] by the softmax of scores [B, m, g, S, L], to [B, m, g, S, d].

    A query's result does not depend on masked scores or values, even if they are NaN. A query whose
    keys are all masked gets zeros. sinks [m, g] are scores without a value.
    """
    sees = seen_positions(mask, start, scores.shape[-2], scores.device)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.unsqueeze(2)
    if sees is not None:
        scores = scores.masked_fill(~sees.unsqueeze(2), -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1)
    if sinks is not None:
        # A sink reduces the weights of keys by the factor sum / (sum + exp(sink)).
        share = torch.logsumexp(scores, -1) - sinks.to(scores.dtype)[..., None]
        weights = weights * torch.sigmoid(share).unsqueeze(-1)
    return _mixed(weights.masked_fill(nothing, 0.0), values, sees)


def _mixed(weights: Tensor, values: Tensor, sees: Tensor | None) -> Tensor:
    """Returns weights @ values without the products of masked positions, which may be 0 * NaN."""
    heads = weights.shape[2:4]
    weights, wide = weights.flatten(2, 3), values.to(weights.dtype)
    if sees is None:
        return (weights @ wide).unflatten(2, heads)
    if heads[1] == 1:  # A position masked for the only query can be zeroed.
        return (weights @ wide.where(sees.mT, 0.0)).unflatten(2, heads)
    # Otherwise only finite values are multiplied, and others are added to the queries that attend
    # to them: NaN as both infinities.
    mixed = (weights @ wide.where(wide.isfinite(), 0.0)).unflatten(2, heads)
    found = torch.cat((~(values < torch.inf), ~(values > -torch.inf)), -1).to(values.dtype)
    above, below = (sees.to(values.dtype) @ found > 0).unsqueeze(2).chunk(2, -1)
    for infinity, there in ((torch.inf, above), (-torch.inf, below)):
        mixed = mixed + torch.zeros_like(mixed[:, :, :1]).masked_fill(there, infinity)
    return mixed
