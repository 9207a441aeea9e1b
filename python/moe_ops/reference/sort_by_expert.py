from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts slots by expert (stable): expert_offsets [E+1], row_to_slot [N], slot_to_row [T, K].

    Slots with ids outside [0, E) are empty and come last, in slot order.
    """
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    row_to_slot = ids.argsort(stable=True)
    slot_to_row = torch.empty_like(row_to_slot)
    slot_to_row[row_to_slot] = torch.arange(ids.numel(), device=ids.device)
    tokens_per_expert = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    expert_offsets = torch.cat([tokens_per_expert.new_zeros(1), tokens_per_expert.cumsum(0)])
    return (
        expert_offsets.to(torch.int32),
        row_to_slot.to(torch.int32),
        slot_to_row.view(topk_ids.shape).to(torch.int32),
    )
