from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype
from .grouped_gemm import grouped_gemm
from .sort_by_expert import sort_by_expert
from .unpermute import unpermute


def moe_linear_reduce(
    h: Tensor,
    w: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes y[t] = sum_k weight[t, k] * (w[e] h[t, k] + bias[e]): h [T, K, D], w [E, H, D] to
    [T, H]."""
    acc = acc_dtype(h.dtype)
    expert_offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w.shape[0])
    end = int(expert_offsets[-1])
    slots = h.flatten(0, 1).to(acc)
    rows = torch.cat(
        [slots[row_to_slot[:end].long()], slots.new_zeros(len(slots) - end, h.shape[-1])]
    )
    bias = None if bias is None else bias.to(acc)
    out = grouped_gemm(rows, w.to(acc), expert_offsets, bias=bias)
    return unpermute(out, expert_offsets, slot_to_row, topk_weights).to(h.dtype)
