"""Which rows go where, and how they come back to their tokens: the local part of a dispatch.

Letters: T tokens, K slots a token, N = T * K, S rows that are sent, n ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moe_ops._private_torch import check_size
from moe_ops.ops import permute, sort_slots, unpermute


class Rows(NamedTuple):
    """Slots sorted by where they go; those that go nowhere come last.

    offsets: [m + 1], exclusive. row_to_slot: [N]. slot_to_row: [T, K].
    """

    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor

    @property
    def counts(self) -> Tensor:
        """[m] int64, rows for each target."""
        return self.offsets.diff().long()

    def take(self, x: Tensor, num_rows: int | None = None) -> Tensor:
        """A row of x [T, H] for each slot that goes somewhere: [S, H]. Without their number, [N, H]
        with zeros at the end."""
        rows = permute(x, self.offsets, self.row_to_slot)
        if num_rows is None:
            return rows
        if is_compiling():
            check_size(num_rows <= rows.shape[0])
        return rows.narrow(0, 0, num_rows)

    def put(self, rows: Tensor, topk_weights: Tensor | None = None) -> Tensor:
        """The sum of a token's rows [S, H], in the order of its slots, times their weights [T, K]:
        [T, H]."""
        missing = self.row_to_slot.shape[0] - rows.shape[0]
        if is_compiling() or missing:
            rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        return unpermute(rows, self.offsets, self.slot_to_row, topk_weights)


def sort_by(targets: Tensor, num_targets: int) -> Rows:
    """The rows of targets [T, K]; others than 0 to num_targets - 1 mean nowhere."""
    return Rows(*sort_slots(targets, num_targets))


def ranks_once(places: Tensor, per_rank: int) -> Tensor:
    """[T, K]: the ranks of the places [T, K], each at the first slot that goes there; -1 at the
    others and where there is no place."""
    ranks = torch.where(places >= 0, places // per_rank, -1)
    same = ranks.unsqueeze(2) == ranks.unsqueeze(1)
    return ranks.masked_fill(same.tril(-1).any(2), -1)


def routing_of_rows(
    rows: Rows,
    num_rows: int | None,
    places: Tensor,
    ranks: Tensor,
    topk_weights: Tensor,
    per_rank: int,
) -> tuple[Tensor, Tensor]:
    """The routing that travels with the rows, for the experts of their ranks alone.

    Args:
        places, ranks: [T, K], as of `ranks_once`. topk_weights: [T, K].

    Returns:
        weights: [S, K], all of the row's token. Differentiable.
        ids: [S, K], places as the row's rank counts them. Those of other ranks, and of no place,
            are outside [0, per_rank).
    """
    slots = rows.row_to_slot if num_rows is None else rows.row_to_slot.narrow(0, 0, num_rows)
    slots = slots.long()
    tokens = slots // max(places.shape[1], 1)
    rank = ranks.reshape(-1).index_select(0, slots).unsqueeze(1)
    # Not by `take`, which is an op that autocast casts for.
    weights = topk_weights.index_select(0, tokens)
    return weights, places.index_select(0, tokens) - rank * per_rank
