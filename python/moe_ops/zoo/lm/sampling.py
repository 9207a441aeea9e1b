"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """[B, 1] from logits [B, V]; the options are those of `CausalLM.generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scores, order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = scores.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        share = probabilities / probabilities.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(share.cumsum(-1) - share >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
