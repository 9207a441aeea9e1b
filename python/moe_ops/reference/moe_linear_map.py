from __future__ import annotations

from torch import Tensor

from .grouped_gemm import grouped_gemm
from .permute import permute
from .sort_by_expert import sort_by_expert


def moe_linear_map(x: Tensor, w: Tensor, topk_ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiplies each token by the matrix of each of its experts: x [T, H], w [E, O, H] to [T, K,
    O].

    Empty slots are zero.
    """
    expert_offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w.shape[0])
    rows = grouped_gemm(permute(x, expert_offsets, row_to_slot), w, expert_offsets, bias=bias)
    return rows[slot_to_row.long()]
