"""dispatch_layout: the layout of tokens sent to the ranks of their experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autograd import plain_call
from moe_ops.ops._checks import check, check_index, check_same_device
from moe_ops.ops._library import register_fake

_dispatch_layout = plain_call("dispatch_layout")


def dispatch_layout(
    topk_ids: Tensor, num_ranks: int, experts_per_rank: int, physical: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plans an exchange in which a token is sent once to every rank that has one of its experts.

    Rank r has the experts from ``r * experts_per_rank`` on. A row is a token sent to a rank; rows
    are sorted by rank, then by token. A rank runs :func:`moe_ffn` on its received rows, their ids
    and their routing weights. In Python::

        offsets, row_to_token, slot_to_row, local_ids = dispatch_layout(topk_ids, n, E // n)
        rows = permute(x, offsets, row_to_token, top_k=1)             # to send, with local_ids and
        weights = permute(topk_weights, offsets, row_to_token, top_k=1)
        y = unpermute(returned_rows, offsets, slot_to_row)            # sums what the ranks return

    Only the device knows the number of rows, so all outputs have the maximum size, R = T * min(K,
    num_ranks), and there is no device sync. The exchange of ``offsets.diff()``, the rows per rank,
    gives the number to the host, and ``row_to_token[:rows]`` is then exact. No gradient.

    Args:
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) are not sent. A token may contain an
            expert twice.
        num_ranks: n, at least 1.
        experts_per_rank: E / n, at least 1; E below 2^31.
        physical: [logical experts], int32 or int64: the physical expert in [0, E) of each logical
            id, for reordered or replicated experts; topk_ids are then logical ids. Entries outside
            [0, E), such as -1, are not sent. None: ids are physical.

    Returns:
        Four int32 tensors: ``rank_offsets`` [n+1], where rank r gets the rows ``rank_offsets[r]``
        to ``rank_offsets[r+1]``; ``row_to_token`` [R]; ``slot_to_row`` [T, K], the row of the first
        slot that sends a token to a rank, -1 for later slots of that rank and for unsent slots;
        ``local_ids`` [R, K], for each slot of the row's token, the index of its expert on the row's
        rank, -1 for experts of other ranks. Unused rows contain -1. T = 0 gives zeros and empty
        maps.

    Raises:
        ValueError: wrong dtype, rank or number; 2^31 slots or more.

    Source:
        The plan of DeepEP's compact dispatch (https://github.com/deepseek-ai/DeepEP).
    """
    return _dispatch_layout(topk_ids, num_ranks, experts_per_rank, physical)


@register_fake("dispatch_layout")
def _(
    topk_ids: Tensor, num_ranks: int, experts_per_rank: int, physical: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "dispatch_layout"
    check_index(op, "topk_ids", topk_ids, "[T, K]")
    check(
        1 <= num_ranks < 2**31 - 1,
        f"{op}: num_ranks must be at least 1 and less than 2^31 - 1, got {num_ranks}.",
    )
    check(
        1 <= experts_per_rank <= (2**31 - 1) // num_ranks,
        f"{op}: experts_per_rank must be at least 1 and, times num_ranks = {num_ranks}, less than "
        f"2^31, got {experts_per_rank}.",
    )
    check_index(op, "physical", physical, "[E]")
    check_same_device(op, topk_ids=topk_ids, physical=physical)
    num_tokens, top_k = topk_ids.shape
    num_rows = num_tokens * torch.sym_min(top_k, num_ranks)
    return (
        topk_ids.new_empty((num_ranks + 1,), dtype=torch.int32),
        topk_ids.new_empty((num_rows,), dtype=torch.int32),
        topk_ids.new_empty((num_tokens, top_k), dtype=torch.int32),
        topk_ids.new_empty((num_rows, top_k), dtype=torch.int32),
    )
