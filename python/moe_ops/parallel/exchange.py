"""Dispatchers that send a token's row only to the ranks of its experts.

Letters: T tokens of this rank, H hidden size, K slots per token, n ranks, R rows that this rank
receives, C capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moe_ops.ops import dispatch_layout, permute, sort_by_expert, unpermute

from .comm import (
    InFlight,
    all_to_all_rows,
    begin_all_to_all_parts,
    exchange_counts,
    to_host,
)
from .dispatch import Dispatcher, DispatchOutput, first_rows
from .placement import ExpertPlacement


class _Sent(NamedTuple):
    """Data for returning results.

    offsets, slot_to_row: the rows of a token among the returned rows, for `unpermute`.
    send, recv: rows for and from each rank when dispatching.
    topk_weights: [T, K], which the sender applies.
    grad_dtype: of x, the dtype in which gradients of results are sent.
    """

    offsets: Tensor
    slot_to_row: Tensor
    send: list[int]
    recv: list[int]
    topk_weights: Tensor | None
    grad_dtype: torch.dtype


class _AllToAll(Dispatcher):
    """Dispatcher that exchanges row counts (a host sync), then sends exactly those rows by
    all-to-all.

    Args:
        fp8: send rows as float8_e4m3fn with one scale per 128 columns, half the bytes of bfloat16;
            results and gradients are sent in the dtype of x. Without gradients, experts with
            fp8_training multiply the quantized rows directly. Not in compiled code.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: ExpertPlacement,
        *,
        fp8: bool = False,
        fp32_combine: bool = False,
    ) -> None:
        super().__init__(group, placement, fp32_combine=fp32_combine)
        self.fp8 = fp8

    def _splits(
        self, send: Tensor, recv: Tensor, slots: Tensor
    ) -> tuple[list[int], list[int], int]:
        """Returns the numbers of rows for and from each rank, [n] each, and the sum of the slots
        from each rank [n], with one device sync."""
        n, numbers = self.num_ranks, to_host(torch.cat([send, recv, slots]))
        return numbers[:n], numbers[n : 2 * n], sum(numbers[2 * n :])

    def _begin(
        self, parts: list[Tensor], recv: list[int], send: list[int]
    ) -> list[Tensor | InFlight]:
        return begin_all_to_all_parts(parts, recv, send, self.group, fp8=self.fp8)

    def combine(self, y: Tensor, state: _Sent) -> Tensor:
        back = all_to_all_rows(y, state.send, state.recv, self.group, grad_dtype=state.grad_dtype)
        return unpermute(back, state.offsets, state.slot_to_row, state.topk_weights)


class AllToAllDispatcher(_AllToAll):
    """Dispatcher that sends one row per token and expert. Weights stay on this rank and are applied
    to the returned rows, in the order and precision of one process: in float32 and float64 the
    output is bitwise identical to that of a process with all experts."""

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        num_ranks, per_rank = self.num_ranks, self.placement.per_rank
        offsets, row_to_slot, slot_to_row = sort_by_expert(
            self.places(topk_ids), self.placement.num_physical
        )
        counts = offsets.diff().view(num_ranks, per_rank)

        def exchange() -> tuple[list[int], list[int], Tensor]:
            received = exchange_counts(counts, self.group)
            rows = received.sum(1)
            send, recv, _ = self._splits(counts.sum(1), rows, rows)
            return send, recv, received

        send, recv, received = self._sizes_of(topk_ids, exchange)
        num_sent, num_rows = sum(send), sum(recv)
        row_to_slot = first_rows(row_to_slot, num_sent)
        slot_to_row = slot_to_row.masked_fill(slot_to_row >= num_sent, -1)
        rows = permute(x, offsets, row_to_slot, top_k=max(topk_ids.shape[1], 1))
        # Each rank's rows are sorted by expert.
        experts = torch.arange(per_rank, device=x.device).repeat(num_ranks)
        ids = experts.repeat_interleave(received.view(-1), output_size=num_rows).unsqueeze(1)
        back = _Sent(offsets, slot_to_row, send, recv, topk_weights, rows.dtype)
        if not on_input:
            (arriving,) = self._begin([rows], recv, send)
            return DispatchOutput(arriving, topk_weights.new_ones(num_rows, 1), ids, back)
        own = topk_weights.reshape(-1, 1).index_select(0, row_to_slot)
        arriving, weights = self._begin([rows, own], recv, send)
        return DispatchOutput(arriving, weights, ids, back._replace(topk_weights=None))


class DedupAllToAllDispatcher(_AllToAll):
    """Dispatcher that sends one row per token and rank with one of its experts, with ids and
    weights; a rank returns the sum of its experts' outputs, rounded to the dtype of x."""

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        offsets, tokens, slot_to_row, ids = dispatch_layout(
            topk_ids, self.num_ranks, self.placement.per_rank, self.table(topk_ids)
        )
        # Rows for each rank, and the slots among them.
        slots = F.pad((ids >= 0).sum(1).cumsum(0), (1, 0)).index_select(0, offsets).diff()
        counts = torch.stack([offsets.diff(), slots.int()], 1)

        def exchange() -> tuple[list[int], list[int], int]:
            received = exchange_counts(counts, self.group)
            return self._splits(counts[:, 0], *received.unbind(1))

        send, recv, num_slots = self._sizes_of(topk_ids, exchange)
        tokens, ids = first_rows(tokens, sum(send)), first_rows(ids, sum(send))
        rows = permute(x, offsets, tokens, top_k=1)
        weights = permute(topk_weights, offsets, tokens, top_k=1)
        state = _Sent(offsets, slot_to_row, send, recv, None, rows.dtype)
        arriving, weights_there, ids_there = self._begin([rows, weights, ids], recv, send)
        return DispatchOutput(arriving, weights_there, ids_there, state, num_slots)


class PaddedAllToAllDispatcher(Dispatcher):
    """Dispatcher that sends the rows of `DedupAllToAllDispatcher` in n parts of C rows each: sizes
    do not depend on the routing, so there is no device sync and the call can be captured in a CUDA
    graph.

    Args:
        capacity: C. If a rank has more rows for another rank, those of its last tokens are dropped.
            None is T, which drops nothing and must be equal on all ranks.

    Attributes:
        num_dropped: [] int64, rows that this rank dropped in the last call.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: ExpertPlacement,
        *,
        capacity: int | None = None,
        fp32_combine: bool = False,
    ) -> None:
        super().__init__(group, placement, fp32_combine=fp32_combine)
        if capacity is not None and capacity < 1:
            raise ValueError(
                f"PaddedAllToAllDispatcher: capacity must be at least 1, got {capacity}."
            )
        self.capacity = capacity
        self.num_dropped: Tensor | None = None

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        num_ranks = self.num_ranks
        capacity = x.shape[0] if self.capacity is None else self.capacity
        offsets, tokens, slot_to_row, ids = dispatch_layout(
            topk_ids, num_ranks, self.placement.per_rank, self.table(topk_ids)
        )
        # The buffer row of each row: -1 for unused rows and rows beyond the capacity.
        row = torch.arange(tokens.shape[0], dtype=torch.int32, device=x.device)
        rank = torch.bucketize(row, offsets[1:], right=True)
        nth = row - offsets.index_select(0, rank)
        fits = (rank < num_ranks) & (nth < capacity)
        line = torch.where(fits, rank * capacity + nth, -1)
        self.num_dropped = offsets[-1].long() - fits.sum()

        def in_lines(t: Tensor) -> Tensor:
            """Copies the rows of t to their buffer rows; other buffer rows are -1."""
            end = num_ranks * capacity
            lines = t.new_full((end + 1, *t.shape[1:]), -1)
            return lines.index_copy(0, line.masked_fill(~fits, end), t)[:end]

        tokens, ids = in_lines(tokens), in_lines(ids)
        # Index -1 selects the last element, which is -1.
        slot_to_line = F.pad(line, (0, 1), value=-1)[slot_to_row.long()]
        lines = torch.arange(num_ranks + 1, device=x.device) * capacity
        rows = permute(x, lines, tokens, top_k=1)
        weights = permute(topk_weights, lines, tokens, top_k=1)
        state = lines, slot_to_line, capacity, rows.dtype
        equal = [capacity] * num_ranks
        parts = [rows, weights, ids]
        arriving, weights_there, ids_there = begin_all_to_all_parts(parts, equal, equal, self.group)
        return DispatchOutput(arriving, weights_there, ids_there, state)

    def combine(self, y: Tensor, state: tuple[Tensor, Tensor, int, torch.dtype]) -> Tensor:
        lines, slot_to_line, capacity, dtype = state
        equal = [capacity] * self.num_ranks
        back = all_to_all_rows(y, equal, equal, self.group, grad_dtype=dtype)
        return unpermute(back, lines, slot_to_line)
