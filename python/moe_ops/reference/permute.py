from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def permute(
    x: Tensor, expert_offsets: Tensor, row_to_slot: Tensor, *, top_k: int | None = None
) -> Tensor:
    """Gathers token rows [T, H] in expert order [N, H]: row r is x[row_to_slot[r] // top_k].

    Tail rows and rows whose slot is -1 are zero. Without top_k there are T * K rows.
    """
    num_tokens, num_rows = x.shape[0], row_to_slot.numel()
    if num_rows == 0:
        return x[:0]
    if top_k is None:
        top_k = num_rows // num_tokens
    if num_tokens == 0:
        x = F.pad(x, (0, 0, 0, 1))  # A row to index
    slot = row_to_slot.long().clone()
    slot[int(expert_offsets[-1]) :] = -1
    rows = x[slot.clamp(min=0) // top_k]
    return rows.masked_fill((slot < 0)[:, None], 0)
