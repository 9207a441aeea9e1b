from __future__ import annotations

import torch
from torch import Tensor

from .sort_by_expert import sort_by_expert


def dispatch_layout(
    topk_ids: Tensor, num_ranks: int, experts_per_rank: int, physical: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plans an exchange in which each token is sent once to every rank that has one of its experts.

    Returns rank_offsets [n+1], row_to_token [R], slot_to_row [T, K] and local_ids [R, K], with R =
    T * min(K, n) rows: those from rank_offsets[n] on are unused and contain -1.
    """
    num_tokens, top_k = topk_ids.shape
    num_experts = num_ranks * experts_per_rank
    ids = topk_ids.long()
    if physical is not None:
        ids = torch.where((ids >= 0) & (ids < physical.numel()), ids, physical.numel())
        ids = torch.cat([physical.long(), ids.new_full((1,), -1)])[ids]
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)

    # A slot sends its token to a rank unless an earlier slot of the token does.
    rank = torch.where(ids >= 0, ids // experts_per_rank, -1)
    repeated = (rank[:, :, None] == rank[:, None, :]).tril(-1).any(2)
    first = (rank >= 0) & ~repeated
    rank_offsets, row_to_slot, slot_to_row = sort_by_expert(torch.where(first, rank, -1), num_ranks)

    num_rows = num_tokens * min(top_k, num_ranks)
    slot = row_to_slot[:num_rows].long()
    used = torch.arange(num_rows, device=ids.device) < rank_offsets[-1]
    token = slot // max(top_k, 1)
    local_ids = ids[token] - experts_per_rank * rank.reshape(-1)[slot][:, None]
    is_local = used[:, None] & (local_ids >= 0) & (local_ids < experts_per_rank)
    return (
        rank_offsets,
        torch.where(used, token, -1).to(torch.int32),
        slot_to_row.masked_fill(~first, -1),
        torch.where(is_local, local_ids, -1).to(torch.int32),
    )
