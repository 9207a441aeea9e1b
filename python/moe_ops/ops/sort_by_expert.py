"""sort_by_expert: slots sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autograd import plain_call
from moe_ops.ops._checks import check, check_index
from moe_ops.ops._library import register_fake

_sort_by_expert = plain_call("sort_by_expert")


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the N = T*K (token, k) slots by expert.

    The sort is stable: rows of an expert keep the order of slots. Empty slots come last, also in
    slot order. No gradient.

    Args:
        topk_ids: [T, K], int32 or int64. Ids outside [0, num_experts) are empty slots.
        num_experts: E, at least 1.

    Returns:
        Three int32 tensors: ``expert_offsets`` [E+1], where expert e has the rows
        ``expert_offsets[e]`` to ``expert_offsets[e+1]`` (the last value is the number of nonempty
        slots); ``row_to_slot`` [N], a permutation of 0..N-1 with slot = t*K + k; ``slot_to_row``
        [T, K], its inverse. T = 0 gives zeros and empty maps.

    Raises:
        ValueError: wrong dtype, rank or num_experts; 2^31 slots or more.
    """
    return _sort_by_expert(topk_ids, num_experts)


@register_fake("sort_by_expert")
def _(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    op = "sort_by_expert"
    check_index(op, "topk_ids", topk_ids, "[T, K]")
    check(num_experts >= 1, f"{op}: num_experts must be at least 1, got {num_experts}.")
    return (
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
        topk_ids.new_empty((topk_ids.numel(),), dtype=torch.int32),
        topk_ids.new_empty(tuple(topk_ids.shape), dtype=torch.int32),
    )
