"""Differentiable collectives that exchange rows of tensors between processes.

Eager code also uses torch's collectives for compiled code: they start, and other computation can
run before their result is waited for, also in backward. Any backend of torch.distributed works. All
ranks of the group must make the same calls in the same order.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from moe_ops._private_torch import check_size, collective_ops, collectives_with_gradients
from moe_ops.formulas.codes import dequantized_rows
from moe_ops.ops import quantize_fp8

from .packing import Packing

_ops = collective_ops()
_funcol = collectives_with_gradients()
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# ------------------------------------------------------------------------------- the debug mode

_checking = os.environ.get("MOE_OPS_CHECK_SPLITS", "0") not in ("", "0")


def set_check_splits(enabled: bool) -> bool:
    """Sets whether ranks compare, before each exchange, the rows to send with those that other
    ranks expect.

    With the check, a mismatch raises an error on every rank; without it, a mismatch ends the
    process or hangs until the group's timeout. The check is an additional collective with a device
    sync, so all ranks must enable it together. It is skipped in compiled code.

    MOE_OPS_CHECK_SPLITS=1 and TORCH_DISTRIBUTED_DEBUG=DETAIL also enable it.

    Returns:
        The previous setting.
    """
    global _checking
    before, _checking = _checking, enabled
    return before


def is_checking_splits() -> bool:
    """Returns whether `set_check_splits` or the environment enables the comparison."""
    return _checking or dist.get_debug_level() == dist.DebugLevel.DETAIL


def _check_own(op: str, x: Tensor, recv: Sequence[int], send: Sequence[int], n: int) -> str | None:
    """Returns the error in this rank's splits that is visible without communication, or None."""
    for name, sizes in (("recv", recv), ("send", send)):
        if len(sizes) != n or min(sizes) < 0:
            return f"{op}: {name} must be {n} numbers of at least 0, got {list(sizes)}."
    if sum(send) != x.shape[0]:
        return f"{op}: send must sum to the {x.shape[0]} rows of x, got {list(send)}."
    return None


def _gather(facts: list[int], device: torch.device, group: ProcessGroup) -> list[list[int]]:
    """Gathers the facts of all ranks."""
    n = group.size()
    mine = torch.tensor(facts, dtype=torch.int64, device=device)
    table = torch.empty(n * len(facts), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(table, mine, group=group)
    lines: list[list[int]] = table.view(n, -1).tolist()
    return lines


def _check_splits(
    op: str, x: Tensor, recv: Sequence[int], send: Sequence[int], group: ProcessGroup
) -> None:
    """Raises ValueError on every rank if the splits of the ranks do not match."""
    n = group.size()
    own = _check_own(op, x, recv, send, n)
    facts = [*send, *recv] if own is None else [0] * 2 * n
    facts += [int(own is not None), x.shape[1:].numel(), x.element_size()]
    table = _gather(facts, x.device, group)
    if own is not None:
        raise ValueError(own)
    for rank, line in enumerate(table):
        if line[2 * n]:
            raise ValueError(
                f"{op}: recv and send must fit the rows of each rank, got others on rank {rank}."
            )
        _check_same(op, "rows of so many elements and bytes an element", line[-2:], table[0], rank)
    for source, target in itertools.product(range(n), range(n)):
        sent, expected = table[source][target], table[target][n + source]
        if sent != expected:
            raise ValueError(
                f"{op}: send must be what the other rank has in recv, got {sent} rows from rank "
                f"{source} to rank {target}, which expects {expected}."
            )


def _check_equal(op: str, x: Tensor, group: ProcessGroup) -> None:
    """Raises ValueError on every rank if the shapes of their tensors differ."""
    facts = [x.shape[0], x.shape[1:].numel(), x.element_size()]
    table = _gather(facts, x.device, group)
    for rank, line in enumerate(table):
        _check_same(op, "rows, elements of a row and bytes of an element", line, table[0], rank)


def _check_same(op: str, what: str, line: list[int], first: list[int], rank: int) -> None:
    wanted = first[-len(line) :]
    if line != wanted:
        raise ValueError(f"{op}: {what} must be {wanted} as on rank 0, got {line} on rank {rank}.")


# ---------------------------------------------------------------------- collectives under way


class InFlight:
    """Tensor that a collective is computing. `wait` returns it, once."""

    def __init__(self, flight: _Flight, index: int = 0) -> None:
        self._flight = flight
        self._index = index

    def wait(self) -> Tensor:
        return self._flight.output(self._index)


class InFlightFp8(InFlight):
    """Rows sent as float8_e4m3fn: received in their own dtype, or as sent."""

    def wait_codes(self) -> tuple[Tensor, Tensor]:
        """Returns float8_e4m3fn [R, H] and their float32 scales [R, ceil(H / 128)] instead of
        `wait`; without gradients."""
        return self._flight.codes()


def wait(x: Tensor | InFlight) -> Tensor:
    """Returns the tensor once it is complete."""
    return x.wait() if isinstance(x, InFlight) else x


class _Flight:
    """A collective of one or more tensors and its adjoint, with their started results.

    begin: starts the collective for the inputs and returns the tensor to wait for.
    adjoint: starts collectives for the gradients of the outputs in `learned`, and returns the
        tensors to wait for.
    end: returns what the complete result contains.
    widen: computes the outputs, one per input, from what `end` returns.
    home: computes the gradients of the inputs in `learned` from the complete results of `adjoint`.
    """

    def __init__(
        self,
        begin: Callable[..., Tensor],
        adjoint: Callable[..., tuple[Tensor, ...]],
        end: Callable[[Tensor], list[Tensor]] = lambda result: [result],
        widen: Callable[[list[Tensor]], list[Tensor]] = lambda outputs: outputs,
        home: Callable[..., Sequence[Tensor]] = lambda *results: results,
    ) -> None:
        self.begin = begin
        self.adjoint = adjoint
        self.end = end
        self.widen = widen
        self.home = home
        self.learned: list[int] = []  # Indices of inputs that require a gradient.
        self.result: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()
        self._token: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def start(self, *inputs: Tensor) -> _Flight:
        self._token = _Begin.apply(self, *inputs)
        return self

    def output(self, index: int) -> Tensor:
        """Returns an output, once. The first call waits for the collective."""
        if self._token is not None:
            token, self._token = self._token, None
            self._outputs = list(_End.apply(token, self))
        y, self._outputs[index] = self._outputs[index], None
        assert y is not None
        return y

    def codes(self) -> tuple[Tensor, Tensor]:
        """Returns the first two tensors of the message instead of output 0; without gradients."""
        self._token = None
        codes, scale, *others = self.arrived()
        self._outputs = [None, *others]
        return codes.view(torch.float8_e4m3fn), scale

    def arrived(self) -> list[Tensor]:
        result, self.result = self.result, None
        return self.end(_ops.wait_tensor(result))


class _Begin(torch.autograd.Function):
    """Starts a collective. Its output, without elements, connects it to its end in the graph.
    Backward starts the adjoint at the end, so computation in between overlaps communication
    again."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, *inputs: Tensor) -> Tensor:
        ctx.flight, ctx.num_inputs = flight, len(inputs)
        flight.learned = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        flight.result = flight.begin(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        started, flight.gradients = flight.gradients, ()
        complete = flight.home(*(_ops.wait_tensor(gradient) for gradient in started))
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        for index, gradient in zip(flight.learned, complete, strict=True):
            gradients[index] = gradient
        return None, *gradients


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> tuple[Tensor, ...]:
        ctx.flight = flight
        outputs = flight.widen(flight.arrived())
        ctx.mark_non_differentiable(*(y for i, y in enumerate(outputs) if i not in flight.learned))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        learned = [grads[i] for i in ctx.flight.learned]
        ctx.flight.gradients = ctx.flight.adjoint(*learned)
        return learned[0].new_empty(0), None


# --------------------------------------------------------------------------------- all to all


def begin_all_to_all_rows(
    x: Tensor,
    recv: Sequence[int],
    send: Sequence[int],
    group: ProcessGroup,
    *,
    grad_dtype: torch.dtype | None = None,
) -> Tensor | InFlight:
    """Starts `all_to_all_rows`; `wait` returns the rows. Its gradient starts where the rows were
    waited for, and is waited for where this was called."""
    if x.dtype in _FP8:
        # gloo does not support these dtypes. Quantized values have no gradient.
        return wait(begin_all_to_all_rows(x.view(torch.uint8), recv, send, group)).view(x.dtype)
    recv, send = list(recv), list(send)
    if is_compiling():
        y: Tensor = _funcol.all_to_all_single_autograd(x.contiguous(), recv, send, group)
        return y
    _check(x, recv, send, group)
    name = group.group_name
    flight = _Flight(
        lambda rows: _ops.all_to_all_single(rows.contiguous(), recv, send, name),
        lambda grad: (_ops.all_to_all_single(_compact(grad, grad_dtype), send, recv, name),),
    )
    return InFlight(flight.start(x))


def _compact(grad: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Autograd gives a gradient the dtype of its tensor.
    return grad.contiguous() if dtype is None else grad.to(dtype).contiguous()


def begin_all_to_all_parts(
    parts: Sequence[Tensor],
    recv: Sequence[int],
    send: Sequence[int],
    group: ProcessGroup,
    *,
    fp8: bool = False,
) -> list[Tensor | InFlight]:
    """Starts `all_to_all_rows` of several tensors as one message, and later of their gradients. In
    compiled code each tensor is a message.

    Args:
        parts: [S, W] each; the first is floating.
        recv, send, group: see `all_to_all_rows`.
        fp8: send the first part quantized to float8_e4m3fn with one scale per 128 columns
            (`moe_ops.quantize_fp8`): half the bytes of bfloat16. Its result has its own dtype, and
            so has its gradient, which ignores the quantization.

    Returns:
        The rows of each part, in flight; with fp8 the first is an `InFlightFp8`.

    Raises:
        NotImplementedError: fp8 in compiled code.
    """
    if is_compiling() and fp8:
        raise NotImplementedError("all_to_all_fp8: torch.compile is not supported.")
    if is_compiling() or (len(parts) == 1 and not fp8):
        return [begin_all_to_all_rows(part, recv, send, group) for part in parts]
    recv, send = list(recv), list(send)
    name, dtype = group.group_name, parts[0].dtype
    packing = home = Packing(parts)

    def begin(*parts: Tensor) -> Tensor:
        nonlocal packing
        if fp8:
            codes, scale = quantize_fp8(parts[0])
            parts = codes.view(torch.uint8), scale, *parts[1:]
        packing = Packing(parts)
        message = packing.pack(parts)
        _check(message, recv, send, group)
        result: Tensor = _ops.all_to_all_single(message, recv, send, name)
        return result

    def widen(received: list[Tensor]) -> list[Tensor]:
        if not fp8:
            return received
        codes, scale, *others = received
        return [dequantized_rows(codes.view(torch.float8_e4m3fn), scale).to(dtype), *others]

    def adjoint(*grads: Tensor) -> tuple[Tensor, ...]:
        nonlocal home
        home = Packing(grads)
        return (_ops.all_to_all_single(home.pack(grads), send, recv, name),)

    flight = _Flight(
        begin,
        adjoint,
        lambda message: packing.unpack(message),
        widen,
        lambda message: home.unpack(message),
    ).start(*parts)
    first = InFlightFp8(flight) if fp8 else InFlight(flight)
    return [first, *(InFlight(flight, i) for i in range(1, len(parts)))]


def _check(x: Tensor, recv: list[int], send: list[int], group: ProcessGroup) -> None:
    op = "all_to_all_rows"
    if is_checking_splits():
        _check_splits(op, x, recv, send, group)
    elif (wrong := _check_own(op, x, recv, send, group.size())) is not None:
        raise ValueError(wrong)


def all_to_all_rows(
    x: Tensor,
    recv: Sequence[int],
    send: Sequence[int],
    group: ProcessGroup,
    *,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sends runs of rows to the ranks of a group, and returns the rows received from them.

    Args:
        x: [S, ...], any dtype; float8 dtypes are sent as bytes and have no gradient.
        recv: number of rows to receive from each rank: see `exchange_counts`.
        send: number of rows for each rank, in the order of x; the sum is S.
        group: the ranks.
        grad_dtype: dtype in which gradients are sent; None is the dtype of x. Not in compiled code.

    Returns:
        [R, ...] in the dtype of x, R the sum of recv, in the order of the ranks.

    Differentiable: gradients are sent back. S = 0 and R = 0 are supported.

    Raises:
        ValueError: splits that do not fit x. Splits that do not match those of another rank end the
            process or hang, unless `set_check_splits` is enabled.
    """
    return wait(begin_all_to_all_rows(x, recv, send, group, grad_dtype=grad_dtype))


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges the numbers of rows, of each kind, that ranks will send to each other.

    Args:
        counts: [n, ...] int, row r for rank r.

    Returns:
        [n, ...] int, row r from rank r.
    """
    n = group.size()
    ones = [1] * n
    if not is_compiling() and is_checking_splits():
        _check_splits("exchange_counts", counts, ones, ones, group)
    received = _ops.all_to_all_single(counts.contiguous(), ones, ones, group.group_name)
    result: Tensor = _ops.wait_tensor(received)
    return result


def to_host(counts: Tensor) -> list[int]:
    """Returns counts [m] as Python integers, with a device sync. Compiled code learns that they are
    nonnegative."""
    numbers: list[int] = counts.tolist()
    if is_compiling():
        for number in numbers:
            check_size(number >= 0)
    return numbers


# --------------------------------------------------------------------- collectives of equal sizes


def begin_all_gather_rows(x: Tensor, group: ProcessGroup) -> Tensor | InFlight:
    """Starts an all-gather of rows [S, ...] to [n * S, ...] in the order of the ranks; `wait`
    returns it. The gradient is the sum over the ranks of the gradients of this rank's rows."""
    if is_compiling():
        y: Tensor = _funcol.all_gather_tensor_autograd(x.contiguous(), 0, group)
        return y
    n, name = group.size(), group.group_name
    if is_checking_splits():
        _check_equal("all_gather_rows", x, group)
    flight = _Flight(
        lambda rows: _ops.all_gather_into_tensor(rows.contiguous(), n, name),
        lambda grad: (_ops.reduce_scatter_tensor(grad.contiguous(), "sum", n, name),),
    )
    return InFlight(flight.start(x))


def begin_all_gather_parts(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor | InFlight]:
    """Starts `begin_all_gather_rows` of several tensors [S, W], the first of them floating, as one
    message. Gradients are reduced one by one because their dtypes may differ. In compiled code each
    tensor is a message."""
    if is_compiling():
        return [begin_all_gather_rows(part, group) for part in parts]
    n, name, packing = group.size(), group.group_name, Packing(parts)

    def begin(*parts: Tensor) -> Tensor:
        message = packing.pack(parts)
        if is_checking_splits():
            _check_equal("all_gather_rows", message, group)
        result: Tensor = _ops.all_gather_into_tensor(message, n, name)
        return result

    def adjoint(*grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(_ops.reduce_scatter_tensor(g.contiguous(), "sum", n, name) for g in grads)

    flight = _Flight(begin, adjoint, packing.unpack).start(*parts)
    return [InFlight(flight, index) for index in range(len(parts))]


def reduce_scatter_rows(
    x: Tensor, group: ProcessGroup, *, grad_dtype: torch.dtype | None = None
) -> Tensor:
    """Computes [S, ...], the sum over the ranks of their rows for this rank, from [n * S, ...]. Its
    gradient is an all-gather, in `grad_dtype` (None: the dtype of x; not in compiled code)."""
    if is_compiling():
        y: Tensor = _funcol.reduce_scatter_tensor_autograd(x.contiguous(), "sum", 0, group)
        return y
    n, name = group.size(), group.group_name
    if is_checking_splits():
        _check_equal("reduce_scatter_rows", x, group)
    flight = _Flight(
        lambda rows: _ops.reduce_scatter_tensor(rows.contiguous(), "sum", n, name),
        lambda grad: (_ops.all_gather_into_tensor(_compact(grad, grad_dtype), n, name),),
    )
    return flight.start(x).output(0)


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Returns x, which is equal on all ranks, each of which computes a part of the result: its
    gradient is summed over the ranks."""
    y: Tensor = _CopyToGroup.apply(x, group.group_name)
    return y


def sum_over_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sums the ranks' parts of a result that all of them continue with: its gradient is equal on
    all ranks."""
    y: Tensor = _SumOverGroup.apply(x, group.group_name)
    return y


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    y: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group_name))
    return y


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group_name), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        return _all_reduce(x, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
