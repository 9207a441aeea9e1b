from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._common import acc_dtype


def unpermute(
    rows: Tensor, expert_offsets: Tensor, slot_to_row: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """Sums the (weighted) rows [N, H] of each token's slots, to [T, H].

    Empty slots, and slots with row -1, add nothing, whatever their row or weight.
    """
    no_expert = (slot_to_row < 0) | (slot_to_row >= expert_offsets[-1])
    if rows.shape[0] == 0:
        rows = F.pad(rows, (0, 0, 0, 1))  # A row to index
    slots = rows[slot_to_row.long().clamp(min=0)].to(acc_dtype(rows.dtype))
    slots = slots.masked_fill(no_expert[..., None], 0)
    if topk_weights is not None:
        weights = topk_weights.to(slots.dtype).masked_fill(no_expert, 0)
        slots = slots * weights[..., None]
    return slots.sum(1).to(rows.dtype)
