"""Dispatchers: they send tokens to the processes that have their experts, and results back.

Each gives a process rows and a routing for its own experts, as in `moe_ffn`: ids of other experts
contribute nothing. This file has the dispatchers that send all tokens to all ranks; `exchange` has
the others.

Letters: T tokens of this rank, H hidden size, K slots per token, n ranks, R rows that this rank
receives.
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

from moe_ops._private_torch import check_size, in_selective_recompute
from moe_ops.layers.recompute import in_backward
from moe_ops.ops import permute, sort_by_expert, unpermute

from .comm import (
    InFlight,
    InFlightFp8,
    begin_all_gather_parts,
    begin_all_gather_rows,
    copy_to_group,
    reduce_scatter_rows,
    sum_over_group,
    to_host,
    wait,
)
from .placement import ExpertPlacement


class Bank(Protocol):
    """Module of experts that a dispatcher runs, such as `layers.Experts`."""

    def forward_local(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        **options: Any,
    ) -> Tensor:
        """Computes [R, O] from rows x [R, H] with the experts of this process; topk_ids [R, K] are
        relative to the first of them, and other ids contribute nothing. R = 0 must keep the
        autograd graph.

        options: out_dtype, dtype of the result, for dispatchers with fp32_combine; x_scale, scales
        of rows in float8_e4m3fn, for experts whose attribute `takes_fp8` is true.
        """
        ...


class DispatchOutput(NamedTuple):
    """Rows for the experts of this process, received or in flight.

    Attributes:
        x: [R, H].
        topk_weights, topk_ids: [R, K'], see `Bank.forward_local`.
        state: data for `combine` of the dispatcher.
        num_slots: number of ids that have an expert on this process, or None. With it, training
            calls `Bank.forward_local` with a row for each of these, so that the memory for backward
            is in proportion to num_slots and not to R * K'; not in compiled code.
        first_expert: subtracted from topk_ids before `Bank.forward_local`.
    """

    x: Tensor | InFlight
    topk_weights: Tensor | InFlight
    topk_ids: Tensor | InFlight
    state: Any
    num_slots: int | None = None
    first_expert: int = 0


class Dispatcher:
    """Runs experts that are distributed over the ranks of a group.

    A subclass implements `dispatch` and `combine`. Other callables with this interface also work.
    Every rank of the group must call it the same number of times, in the same order of layers, also
    without tokens; the losses of all ranks must depend on the results, or backward waits forever
    for a rank.

    Args:
        group: the ranks; a one-dimensional mesh, or None for a single process.
        placement: the experts of each rank.
        fp32_combine: with bfloat16 and float16, return results in float32 and round once after
            adding a token's results: 50 % more bytes in forward, none in backward.

    Raises:
        ValueError: a placement for another number of ranks.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: ExpertPlacement,
        *,
        fp32_combine: bool = False,
    ) -> None:
        group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.group: Any = group
        self.num_ranks = 1 if group is None else group.size()
        self.rank = 0 if group is None else dist.get_rank(group)
        self.fp32_combine = fp32_combine
        # The rank whose table defines where tokens are sent.
        self.table_of = self.rank
        self._sizes: Any = WeakTensorKeyDictionary()
        self.set_placement(placement)

    def set_placement(self, placement: ExpertPlacement) -> None:
        """Sets the placement for later calls; `moe_ops.parallel.move_experts` also moves the
        weights."""
        if placement.num_ranks != self.num_ranks:
            raise ValueError(
                f"{type(self).__name__}: placement must be for the {self.num_ranks} ranks of the "
                f"group, got one for {placement.num_ranks}."
            )
        self.placement = placement
        self._table: Tensor | None = None

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
        """Computes the experts of all ranks for the tokens of this one.

        Args:
            bank: experts of this rank.
            x: [T, H]; T may differ between ranks.
            topk_weights: [T, K] float.
            topk_ids: [T, K] int32 or int64, of all experts; ids outside [0, E) contribute nothing.
            apply_router_weight_on_input: see `Experts.forward`.
            overlap: called once while rows are in flight; its gradients are computed while
                gradients of the rows are in flight.

        Returns:
            [T, O] in the dtype of x, or that of autocast.
        """
        x = _as_multiplied(x)
        sent = self.dispatch(x, topk_weights, topk_ids, apply_router_weight_on_input)
        if overlap is not None:
            overlap()
        dtype = x.dtype
        options: dict[str, Any] = {"apply_router_weight_on_input": apply_router_weight_on_input}
        if self.fp32_combine and dtype.itemsize < 4:
            options["out_dtype"] = torch.float32
        rows = sent.x
        if (
            isinstance(rows, InFlightFp8)
            and not torch.is_grad_enabled()
            and getattr(bank, "takes_fp8", False)
        ):
            rows, options["x_scale"] = rows.wait_codes()
            options.setdefault("out_dtype", dtype)
        ids = wait(sent.topk_ids)
        if sent.first_expert:
            ids = ids - sent.first_expert
        call = wait(rows), wait(sent.topk_weights), ids
        training = torch.is_grad_enabled() and not is_compiling()
        if sent.num_slots is not None and training:
            y = self._forward_by_slot(bank, *call, sent.num_slots, options)
        else:
            y = bank.forward_local(*call, **options)
        y = self.combine(y, sent.state)
        return y.to(dtype) if self.fp32_combine else y

    def _forward_by_slot(
        self,
        bank: Bank,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_slots: int,
        options: dict[str, Any],
    ) -> Tensor:
        """Computes `bank.forward_local` with one row per nonempty slot, in the order of experts."""
        offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, self.placement.per_rank)
        row_to_slot = first_rows(row_to_slot, num_slots)
        slot_to_row = slot_to_row.masked_fill(slot_to_row >= num_slots, -1)
        rows = permute(x, offsets, row_to_slot, top_k=topk_ids.shape[1])
        weights, ids = (
            t.reshape(-1, 1).index_select(0, row_to_slot) for t in (topk_weights, topk_ids)
        )
        y = bank.forward_local(rows, weights, ids, **options)
        return unpermute(y, offsets, slot_to_row)

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        """Sends the tokens to the ranks of their experts. on_input: experts weight their input."""
        raise NotImplementedError

    def combine(self, y: Tensor, state: Any) -> Tensor:
        """Returns the experts' rows [R, O] to their tokens: [T, O]."""
        raise NotImplementedError

    def table(self, topk_ids: Tensor) -> Tensor | None:
        """Returns [E] int32, on the device of the ids: the physical expert of each expert for
        tokens of this rank; None if expert e is physical expert e and none is empty."""
        if self.placement.is_identity:
            return None
        if self._table is not None and self._table.device == topk_ids.device:
            return self._table
        places = self.placement.table(self.table_of)
        table = torch.tensor(places, dtype=torch.int32, device=topk_ids.device)
        # Tensors made by a tracing mode are not cached.
        if not (is_compiling() or topk_ids.is_inference()) and type(table) is Tensor:
            self._table = table
        return table

    def places(self, topk_ids: Tensor) -> Tensor:
        """Returns the physical experts of the ids for tokens of this rank, [T, K]; outside [0, P)
        for empty slots."""
        table = self.table(topk_ids)
        if table is None:
            return topk_ids
        return self.placement.to_physical(topk_ids, self.table_of, table)

    def _sizes_of(self, topk_ids: Tensor, exchange: Callable[[], Any]) -> Any:
        """Returns the result of `exchange`, the sizes of a routing on all ranks. Recomputation for
        backward passes the ids tensor of the first pass (freeze_routing_in_recompute of
        `layers.MoE`) and reuses its sizes; not under selective checkpointing, a mode that finds
        saved results by counting the calls of an operation."""
        if is_compiling() or topk_ids.is_inference():
            return exchange()
        version = topk_ids._version
        if in_backward() and not in_selective_recompute():
            known, sizes = self._sizes.get(topk_ids, (None, None))
            if known == version:
                return sizes
        sizes = exchange()
        self._sizes[topk_ids] = version, sizes
        return sizes

    def __deepcopy__(self, memo: dict) -> Dispatcher:
        # A copied layer sends to the same processes.
        twin = copy.copy(self)
        twin._sizes = WeakTensorKeyDictionary()
        return twin

    def __repr__(self) -> str:
        experts = f"{len(self.placement.local(self.rank))} of {self.placement.num_experts} experts"
        return f"{type(self).__name__}(rank {self.rank} of {self.num_ranks}, {experts})"


def first_rows(rows: Tensor, number: int) -> Tensor:
    """Returns the first `number` rows, of which compiled code learns that they exist."""
    if is_compiling():
        check_size(number <= rows.shape[0])
    return rows.narrow(0, 0, number)


def _as_multiplied(x: Tensor) -> Tensor:
    """Casts x as autocast would in the GEMMs, before it is sent."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class LocalDispatcher(Dispatcher):
    """Dispatcher for one process with all experts: nothing is sent, and options of sending have no
    effect."""

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None = None,
        *,
        placement: ExpertPlacement,
        fp32_combine: bool = False,
        fp8: bool = False,
    ) -> None:
        super().__init__(group, placement)

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        return DispatchOutput(x, topk_weights, self.places(topk_ids), None)

    def combine(self, y: Tensor, state: None) -> Tensor:
        return y


class ReplicatedDispatcher(Dispatcher):
    """Dispatcher for ranks with equal tokens, as in tensor parallelism: each adds the contribution
    of its experts, with an all-reduce of the output and, in backward, of the gradients of x and
    topk_weights.

    Everything before and after must also be equal on all ranks, including random numbers of a
    router.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: ExpertPlacement,
        *,
        fp32_combine: bool = False,
    ) -> None:
        super().__init__(group, placement, fp32_combine=fp32_combine)
        # The ranks must use the same physical expert for each expert.
        self.table_of = 0

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        places = self.places(topk_ids)
        x = copy_to_group(x, self.group)
        topk_weights = copy_to_group(topk_weights, self.group)
        return DispatchOutput(x, topk_weights, places - self.rank * self.placement.per_rank, None)

    def combine(self, y: Tensor, state: None) -> Tensor:
        return sum_over_group(y, self.group)


class AllGatherDispatcher(Dispatcher):
    """Dispatcher that sends all tokens to every rank, which computes the contribution of its
    experts; the results are summed and scattered: an all-gather and a reduce-scatter of n times the
    tokens.

    Args:
        num_tokens: rows that each rank sends, padded beyond its tokens: at least T on every rank.
            None: the ranks agree on the largest T of each call, with a device sync.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        placement: ExpertPlacement,
        *,
        num_tokens: int | None = None,
        fp32_combine: bool = False,
    ) -> None:
        super().__init__(group, placement, fp32_combine=fp32_combine)
        self.num_tokens = num_tokens

    def dispatch(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> DispatchOutput:
        num_tokens = x.shape[0]
        size = self.num_tokens
        if size is None:
            size = self._sizes_of(topk_ids, lambda: self._largest(num_tokens, topk_ids.device))
        if not is_compiling() and num_tokens > size:
            raise ValueError(
                f"AllGatherDispatcher: x must have at most num_tokens = {size} tokens, got "
                f"{num_tokens}."
            )
        rows = (0, 0, 0, size - num_tokens)
        places = F.pad(self.places(topk_ids), rows, value=-1)
        parts = [F.pad(x, rows), F.pad(topk_weights, rows), places]
        received, weights, ids = begin_all_gather_parts(parts, self.group)
        first = self.rank * self.placement.per_rank
        return DispatchOutput(received, weights, ids, (num_tokens, x.dtype), first_expert=first)

    def combine(self, y: Tensor, state: tuple[int, torch.dtype]) -> Tensor:
        num_tokens, dtype = state
        return reduce_scatter_rows(y, self.group, grad_dtype=dtype)[:num_tokens]

    def _largest(self, num_tokens: int, device: torch.device) -> int:
        mine = torch.full((1,), num_tokens, dtype=torch.int64, device=device)
        return max(to_host(wait(begin_all_gather_rows(mine, self.group))))
