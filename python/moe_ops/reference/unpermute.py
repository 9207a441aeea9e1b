from __future__ import annotations

from torch import Tensor

from ._common import acc_dtype


def unpermute(
    rows: Tensor, expert_offsets: Tensor, slot_to_row: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """Rows [N, H] back to tokens [T, H]: the (weighted) sum of the rows of a token's slots.

    Slots without an expert add nothing, whatever their row or weight holds.
    """
    no_expert = slot_to_row >= expert_offsets[-1]
    slots = rows[slot_to_row.long()].to(acc_dtype(rows.dtype))
    slots = slots.masked_fill(no_expert[..., None], 0)
    if topk_weights is not None:
        weights = topk_weights.to(slots.dtype).masked_fill(no_expert, 0)
        slots = slots * weights[..., None]
    return slots.sum(1).to(rows.dtype)
