from __future__ import annotations

import torch
from torch import Tensor


def permute(x: Tensor, expert_offsets: Tensor, row_to_slot: Tensor) -> Tensor:
    """Token rows [T, H] in expert order [N, H], each token N/T times; tail rows are zero."""
    num_tokens, hidden_size = x.shape
    num_rows = row_to_slot.numel()
    if num_rows == 0:
        return x[:0]
    top_k = num_rows // num_tokens
    end = int(expert_offsets[-1])
    rows = x[row_to_slot[:end].long() // top_k]
    return torch.cat([rows, x.new_zeros(num_rows - end, hidden_size)])
