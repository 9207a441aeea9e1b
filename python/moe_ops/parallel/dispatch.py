"""Dispatchers: how tokens get to the processes that have their experts, and back.

Each gives the bank of a process rows and a routing for its own experts, which is what `moe_ffn`
takes: ids that are nobody's here contribute nothing.

Letters: T tokens of this rank, H hidden size, K slots a token, n ranks, R rows that this rank gets,
C capacity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from moe_ops.layers.recompute import in_backward

from .comm import (
    InFlight,
    all_to_all_rows,
    begin_all_gather_rows,
    begin_all_to_all_fp8,
    begin_all_to_all_rows,
    copy_to_group,
    exchange_counts,
    reduce_scatter_rows,
    sum_over_group,
    to_host,
    wait,
)
from .placement import Placement
from .rows import Rows, ranks_once, routing_of_rows, sort_by


class Bank(Protocol):
    """What a dispatcher brings rows to, such as `layers.Experts`."""

    def forward_local(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """[R, O] of rows x [R, H] by the experts of this process; topk_ids [R, K] count from the
        first of them, and others contribute nothing. R = 0 must keep the graph of autograd."""
        ...


class Dispatched(NamedTuple):
    """Rows that are here, or on their way, for the experts of this process.

    x: [R, H]. topk_weights, topk_ids: [R, K'], as `Bank.forward_local` takes them.
    state: what `combine` of the dispatcher needs.
    """

    x: Tensor | InFlight
    topk_weights: Tensor | InFlight
    topk_ids: Tensor | InFlight
    state: Any


class Dispatcher:
    """Runs a bank whose experts are spread over the ranks of a group.

    A subclass has `dispatch` and `combine`. Anything else that is called like this will do as well.
    Every rank of the group has to call it the same number of times, in the same order of layers,
    also with no tokens; the losses of all ranks have to depend on the results, or backward waits
    for a rank that never comes.

    Args:
        group: the ranks; a mesh of one dimension, or None for a process alone.
        placement: which of them has which experts.

    Raises:
        ValueError: a placement for another number of ranks.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None, placement: Placement) -> None:
        group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.group: Any = group
        self.num_ranks = 1 if group is None else group.size()
        self.rank = 0 if group is None else dist.get_rank(group)
        self.placement = placement
        if placement.num_ranks != self.num_ranks:
            raise ValueError(
                f"{type(self).__name__}: placement must be for the {self.num_ranks} ranks of the "
                f"group, got one for {placement.num_ranks}."
            )
        # The rank whose table says where tokens go.
        self.table_of = self.rank
        self._table: Tensor | None = None
        self._sizes: Any = WeakTensorKeyDictionary()

    def __call__(
        self,
        bank: Bank,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], None] | None = None,
    ) -> Tensor:
        """What the experts of all ranks make of the tokens of this one.

        Args:
            bank: has the experts of this rank.
            x: [T, H], T another one on each rank if need be.
            topk_weights: [T, K] float. topk_ids: [T, K] int32 or int64, of all experts; ids
                outside [0, E) contribute nothing.
            apply_router_weight_on_input: as of `Experts.forward`.
            overlap: called once while rows are on their way; gradients of what it computes are
                computed while gradients of the rows are.

        Returns:
            [T, O] in the dtype of x.
        """
        on_input = apply_router_weight_on_input
        sent = self.dispatch(x, topk_weights, topk_ids, on_input)
        if overlap is not None:
            overlap()
        rows, weights, ids = wait(sent.x), wait(sent.topk_weights), wait(sent.topk_ids)
        y = bank.forward_local(rows, weights, ids, apply_router_weight_on_input=on_input)
        return self.combine(y, sent.state)

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        """Sends the tokens to the ranks of their experts. on_input: experts weight their input."""
        raise NotImplementedError

    def combine(self, y: Tensor, state: Any) -> Tensor:
        """Returns the experts' rows [R, O] to their tokens: [T, O]."""
        raise NotImplementedError

    def places(self, topk_ids: Tensor) -> Tensor:
        """[T, K] int32: the places of the experts for tokens of this rank, -1 for ids of none."""
        rank, table = self.table_of, self._table
        if table is None or table.device != topk_ids.device:
            if self.placement.is_contiguous or is_compiling() or topk_ids.is_inference():
                return self.placement.to_physical(topk_ids, rank)
            table = torch.tensor(
                self.placement.table(rank), dtype=torch.int32, device=topk_ids.device
            )
            if type(table) is Tensor:  # A mode that traces makes others.
                self._table = table
        return self.placement.to_physical(topk_ids, rank, table)

    def _sizes_of(self, topk_ids: Tensor, exchange: Callable[[], Any]) -> Any:
        """What `exchange` finds out about a routing together with the other ranks. Recomputation
        for backward passes on the ids of the first pass (freeze_routing_in_recompute of
        `layers.MoE`) and need not ask again."""
        if is_compiling() or topk_ids.is_inference():
            return exchange()
        version = topk_ids._version
        if in_backward():
            known, sizes = self._sizes.get(topk_ids, (None, None))
            if known == version:
                return sizes
        sizes = exchange()
        self._sizes[topk_ids] = version, sizes
        return sizes

    def __deepcopy__(self, memo: dict) -> Dispatcher:
        # The copy of a layer sends to the same processes.
        twin = copy.copy(self)
        twin._sizes = WeakTensorKeyDictionary()
        return twin

    def __repr__(self) -> str:
        experts = f"{len(self.placement.local(self.rank))} of {self.placement.num_experts} experts"
        return f"{type(self).__name__}(rank {self.rank} of {self.num_ranks}, {experts})"


class Local(Dispatcher):
    """One process has all experts: nothing is sent."""

    def __init__(
        self, group: ProcessGroup | DeviceMesh | None = None, *, placement: Placement
    ) -> None:
        super().__init__(group, placement)

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        return Dispatched(x, topk_weights, self.places(topk_ids), None)

    def combine(self, y: Tensor, state: None) -> Tensor:
        return y


class Shared(Dispatcher):
    """All ranks have the same tokens, as under tensor parallelism, and each adds the share of its
    experts: an all-reduce of the output and, in backward, of the gradients of x and topk_weights.

    Whatever else comes before and after must be the same on all ranks too, random numbers of a
    router included.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None, placement: Placement) -> None:
        super().__init__(group, placement)
        # The ranks agree on one place for each expert.
        self.table_of = 0

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        places = self.places(topk_ids)
        x = copy_to_group(x, self.group)
        topk_weights = copy_to_group(topk_weights, self.group)
        return Dispatched(x, topk_weights, places - self.rank * self.placement.per_rank, None)

    def combine(self, y: Tensor, state: None) -> Tensor:
        return sum_over_group(y, self.group)


class Gather(Dispatcher):
    """Every rank gets all tokens and computes what its experts add to them; a sum over the ranks
    scatters the results: an all-gather and a reduce-scatter of n times the tokens.

    Args:
        num_tokens: rows that each rank sends, those beyond its tokens empty: at least T on every
            rank. None: the ranks agree on the largest T of each call, which waits for the device.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: Placement,
        *,
        num_tokens: int | None = None,
    ) -> None:
        super().__init__(group, placement)
        self.num_tokens = num_tokens

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        num_tokens = x.shape[0]
        size = self.num_tokens
        if size is None:
            size = self._sizes_of(topk_ids, lambda: self._largest(num_tokens, topk_ids.device))
        if not is_compiling() and num_tokens > size:
            raise ValueError(
                f"Gather: x must have at most num_tokens = {size} tokens, got {num_tokens}."
            )
        rows = (0, 0, 0, size - num_tokens)
        places = F.pad(self.places(topk_ids), rows, value=-1)
        received = begin_all_gather_rows(F.pad(x, rows), self.group)
        weights = begin_all_gather_rows(F.pad(topk_weights, rows), self.group)
        ids = wait(begin_all_gather_rows(places, self.group))
        local = ids - self.rank * self.placement.per_rank
        return Dispatched(received, weights, local, num_tokens)

    def combine(self, y: Tensor, state: int) -> Tensor:
        return reduce_scatter_rows(y, self.group)[:state]

    def _largest(self, num_tokens: int, device: torch.device) -> int:
        mine = torch.full((1,), num_tokens, dtype=torch.int64, device=device)
        return max(to_host(wait(begin_all_gather_rows(mine, self.group))))


class _Sent(NamedTuple):
    """What the way back needs: the rows that were sent, how many to and from each rank, and the
    weights that the sender applies."""

    rows: Rows
    send: list[int]
    recv: list[int]
    topk_weights: Tensor | None


class _AllToAll(Dispatcher):
    """Rows go to the ranks of their experts by an all-to-all of exactly those, after one of their
    numbers, which the host has to know.

    Args:
        fp8: rows travel as float8_e4m3fn with a scale for each 128 columns, half the bytes of
            bfloat16; results and gradients in the dtype of x. Not in compiled code.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: Placement,
        *,
        fp8: bool = False,
    ) -> None:
        super().__init__(group, placement)
        self.fp8 = fp8

    def _splits(self, send: Tensor, recv: Tensor) -> tuple[list[int], list[int]]:
        """Numbers of rows for and from each rank, [n] each, by one wait for the device."""
        numbers = to_host(torch.cat([send, recv]))
        return numbers[: self.num_ranks], numbers[self.num_ranks :]

    def _begin(self, rows: Tensor, recv: list[int], send: list[int]) -> Tensor | InFlight:
        begin = begin_all_to_all_fp8 if self.fp8 else begin_all_to_all_rows
        return begin(rows, recv, send, self.group)

    def combine(self, y: Tensor, state: _Sent) -> Tensor:
        back = all_to_all_rows(y, state.send, state.recv, self.group)
        return state.rows.put(back, state.topk_weights)


class Slots(_AllToAll):
    """A row for each token and each of its experts. Weights stay here and are applied to what comes
    back, in the order and precision of one process: in float32 and float64 the output has the bits
    of a process that has all experts."""

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        num_ranks, per_rank = self.num_ranks, self.placement.per_rank
        rows = sort_by(self.places(topk_ids), self.placement.num_physical)

        def exchange() -> tuple[list[int], list[int], Tensor]:
            counts = rows.counts.view(num_ranks, per_rank)
            received = exchange_counts(counts, self.group)
            return *self._splits(counts.sum(1), received.sum(1)), received

        send, recv, received = self._sizes_of(topk_ids, exchange)
        num_rows = sum(recv)
        arriving = self._begin(rows.take(x, sum(send)), recv, send)
        # Each rank's rows are sorted by expert.
        experts = torch.arange(per_rank, device=x.device).repeat(num_ranks)
        ids = experts.repeat_interleave(received.view(-1), output_size=num_rows).unsqueeze(1)
        if not on_input:
            weights: Any = topk_weights.new_ones(num_rows, 1)
            return Dispatched(arriving, weights, ids, _Sent(rows, send, recv, topk_weights))
        slots = rows.row_to_slot.narrow(0, 0, sum(send)).long()
        own = topk_weights.reshape(-1, 1).index_select(0, slots)
        weights = begin_all_to_all_rows(own, recv, send, self.group)
        return Dispatched(arriving, weights, ids, _Sent(rows, send, recv, None))


class Tokens(_AllToAll):
    """A row for each token and each rank that has one of its experts, with ids and weights; a rank
    returns the sum of its experts' outputs, which is rounded to the dtype of x."""

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        num_ranks, per_rank = self.num_ranks, self.placement.per_rank
        places = self.places(topk_ids)
        ranks = ranks_once(places, per_rank)
        rows = sort_by(ranks, num_ranks)

        def exchange() -> tuple[list[int], list[int]]:
            return self._splits(rows.counts, exchange_counts(rows.counts, self.group))

        send, recv = self._sizes_of(topk_ids, exchange)
        weights, ids = routing_of_rows(rows, sum(send), places, ranks, topk_weights, per_rank)
        return Dispatched(
            self._begin(rows.take(x, sum(send)), recv, send),
            begin_all_to_all_rows(weights, recv, send, self.group),
            begin_all_to_all_rows(ids, recv, send, self.group),
            _Sent(rows, send, recv, None),
        )


class Padded(Dispatcher):
    """Rows as of `Tokens`, in n parts of C rows each: sizes do not depend on the routing, so nobody
    waits for the device and the call can be captured in a CUDA graph.

    Args:
        capacity: C. A rank that gets more rows of another one than that drops those of the last
            tokens. None is T, which drops nothing and has to be the same on all ranks.

    Attributes:
        num_dropped: [] int64, rows that this rank could not send in the last call.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: Placement,
        *,
        capacity: int | None = None,
    ) -> None:
        super().__init__(group, placement)
        if capacity is not None and capacity < 1:
            raise ValueError(f"Padded: capacity must be at least 1, got {capacity}.")
        self.capacity = capacity
        self.num_dropped: Tensor | None = None

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Dispatched:
        num_ranks, per_rank = self.num_ranks, self.placement.per_rank
        capacity = x.shape[0] if self.capacity is None else self.capacity
        places = self.places(topk_ids)
        ranks = ranks_once(places, per_rank)
        rows = sort_by(ranks, num_ranks)
        num_slots = rows.row_to_slot.shape[0]
        # Of each row that may be sent: its number in the buffer, or the one behind the last.
        rank = ranks.reshape(-1).index_select(0, rows.row_to_slot.long())
        first = rows.offsets.index_select(0, rank.clamp(min=0))
        nth = torch.arange(num_slots, device=x.device) - first
        fits = (rank >= 0) & (nth < capacity)
        end = num_ranks * capacity
        where = torch.where(fits, rank * capacity + nth, end)
        self.num_dropped = ((rank >= 0) & ~fits).sum()
        # Of each line of the buffer: the row that it holds, or the one behind the last.
        line = torch.arange(end, device=x.device)
        source = rows.offsets.index_select(0, line // max(capacity, 1)) + line % max(capacity, 1)
        filled = source < rows.offsets.index_select(0, line // max(capacity, 1) + 1)
        source = torch.where(filled, source, num_slots)
        weights, ids = routing_of_rows(rows, None, places, ranks, topk_weights, per_rank)

        def lines(t: Tensor, value: float) -> Tensor | InFlight:
            padded = F.pad(t, (0, 0, 0, 1), value=value).index_select(0, source)
            equal = [capacity] * num_ranks
            return begin_all_to_all_rows(padded, equal, equal, self.group)

        state = rows, where, capacity
        return Dispatched(lines(rows.take(x), 0.0), lines(weights, 0.0), lines(ids, -1), state)

    def combine(self, y: Tensor, state: tuple[Rows, Tensor, int]) -> Tensor:
        rows, where, capacity = state
        equal = [capacity] * self.num_ranks
        back = F.pad(all_to_all_rows(y, equal, equal, self.group), (0, 0, 0, 1))
        return rows.put(back.index_select(0, where))
