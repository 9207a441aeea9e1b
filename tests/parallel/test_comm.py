"""Collectives of rows on real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_ops import quantize_fp8
from moe_ops.parallel import comm
from moe_ops.parallel.comm import all_to_all_rows, exchange_counts, set_check_splits
from moe_ops.reference.quantize_fp8 import dequantize_rows
from moe_ops.testing import assert_identical

pytestmark = pytest.mark.cpu_only

# SENT[a][b] rows go from rank a to rank b.
SENT = [[2, 0, 3, 1], [0, 0, 0, 0], [1, 4, 0, 2], [0, 0, 5, 0]]
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)


def rows_of(rank: int, width: int = 3) -> Tensor:
    """Each row says where it comes from, where it goes, and its number."""
    lines = [[rank, to, i] for to, count in enumerate(SENT[rank]) for i in range(count)]
    return torch.tensor(lines, dtype=torch.float32).view(-1, 3).repeat(1, -(-width // 3))[:, :width]


def arrived_at(rank: int) -> Tensor:
    lines = [[a, rank, i] for a in range(4) for i in range(SENT[a][rank])]
    return torch.tensor(lines, dtype=torch.float32).view(-1, 3)


def splits(rank: int) -> tuple[list[int], list[int]]:
    return [SENT[a][rank] for a in range(4)], SENT[rank]


def exchange_everything(rank: int) -> None:
    group = dist.group.WORLD
    recv, send = splits(rank)
    assert exchange_counts(torch.tensor(send), group).tolist() == recv
    for dtype in DTYPES:
        x = rows_of(rank).to(dtype)
        y = all_to_all_rows(x, recv, send, group)
        assert y.dtype == dtype and torch.equal(y.float(), arrived_at(rank).to(dtype).float())
    # Strides of any kind.
    x = rows_of(rank).T.contiguous().T
    assert torch.equal(all_to_all_rows(x, recv, send, group), arrived_at(rank))

    x = rows_of(rank).double().requires_grad_()
    y = all_to_all_rows(x, recv, send, group)
    (y * (rank + 1)).sum().backward()
    assert type(x.grad) is Tensor
    targets = x[:, 1:2].detach().expand(-1, 3)
    assert torch.equal(x.grad, targets + 1)
    assert not y.isnan().any()

    # A result that is used twice, and a backward that is run twice.
    x.grad = None
    y = all_to_all_rows(x, recv, send, group)
    loss = (y * y).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, 4 * x.detach())


def test_all_to_all(processes):
    processes.run(exchange_everything)


def in_flight(rank: int) -> None:
    """Two exchanges under way at once, waited for the other way round."""
    group = dist.group.WORLD
    recv, send = splits(rank)
    x = rows_of(rank).requires_grad_()
    first = comm.begin_all_to_all_rows(x, recv, send, group)
    second = comm.begin_all_to_all_rows(x * 2, recv, send, group)
    y = comm.wait(second)
    assert torch.equal(y, 2 * arrived_at(rank))
    assert torch.equal(comm.wait(first), arrived_at(rank))
    (y.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_several_under_way(processes):
    processes.run(in_flight)


def equal_sizes(rank: int) -> None:
    group = dist.group.WORLD
    x = (torch.arange(6.0).view(3, 2) + 10 * rank).double().requires_grad_()
    gathered = comm.wait(comm.begin_all_gather_rows(x, group))
    everything = torch.cat([torch.arange(6.0).view(3, 2) + 10 * r for r in range(4)])
    assert torch.equal(gathered, everything.double())
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 10))

    x = everything.double().requires_grad_()
    part = comm.reduce_scatter_rows(x * (rank + 1), group)
    assert torch.equal(part, 10 * everything[3 * rank : 3 * rank + 3].double())
    (part * (rank + 1)).sum().backward()
    owners = torch.arange(4.0).repeat_interleave(3).unsqueeze(1).expand(12, 2)
    assert torch.equal(x.grad, ((owners + 1) * (rank + 1)).double())

    x = torch.ones(2, 2, requires_grad=True)
    y = comm.sum_over_group(comm.copy_to_group(x, group) * (rank + 1), group)
    assert torch.equal(y, torch.full_like(y, 10))
    (3 * y).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 30))


def test_equal_sizes(processes):
    processes.run(equal_sizes)


def rounded_rows(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    recv, send = splits(rank)
    torch.manual_seed(rank)
    x = torch.randn(sum(send), 200).to(dtype).requires_grad_()
    (sent,) = comm.begin_all_to_all_parts([x], recv, send, dist.group.WORLD, fp8=True)
    y = comm.wait(sent)
    assert y.dtype == dtype
    y.backward(torch.full_like(y, 0.3))
    return x.detach(), y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_fp8(processes, dtype):
    found = processes.run(rounded_rows, dtype)
    sent = [x.split(SENT[rank]) for rank, (x, _, _) in enumerate(found)]
    for rank, (x, y, grad) in enumerate(found):
        wanted = torch.cat([dequantize_rows(*quantize_fp8(sent[a][rank])) for a in range(4)])
        assert_identical(y, wanted.to(dtype))
        assert_identical(grad, torch.full_like(x, 0.3))


def parts_of_one_message(rank: int, dtype: torch.dtype, width: int, fp8: bool) -> None:
    """Parts arrive as they would alone; so do the gradients of parts that require one."""
    group = dist.group.WORLD
    recv, send = splits(rank)
    torch.manual_seed(rank)
    x = torch.randn(sum(send), width).to(dtype)
    weights, ids = torch.rand(sum(send), 3), torch.randint(-1, 9, (sum(send), 3))
    for learned in ([x], [weights], [x, weights], []):
        for part in (x, weights):
            part.grad = None
            part.requires_grad_(any(part is t for t in learned))
        begun = comm.begin_all_to_all_parts([x, weights, ids], recv, send, group, fp8=fp8)
        got = [comm.wait(part) for part in begun]
        sent = x.detach()
        if fp8:
            sent = dequantize_rows(*quantize_fp8(sent)).to(dtype)
        parts = [sent, weights.detach(), ids]
        for y, part in zip(got, parts, strict=True):
            assert y.dtype == part.dtype and y.is_contiguous()
            assert_identical(y.detach(), all_to_all_rows(part, recv, send, group))
        assert [y.requires_grad for y in got[:2]] == [x.requires_grad, weights.requires_grad]
        if not learned:
            continue
        factors = [torch.rand(y.shape).to(y.dtype) for y in got[:2]]
        sum((y * f).sum() for y, f in zip(got, factors, strict=False) if y.requires_grad).backward()
        for part, factor in zip((x, weights), factors, strict=True):
            if part.requires_grad:
                assert_identical(part.grad, all_to_all_rows(factor, send, recv, group))
            else:
                assert part.grad is None


@pytest.mark.parametrize(
    ("dtype", "width", "fp8"),
    [
        (torch.float64, 5, False),
        (torch.float32, 5, False),
        (torch.bfloat16, 5, False),
        (torch.float16, 8, False),
        (torch.bfloat16, 131, True),
        (torch.float32, 128, True),
    ],
    ids=str,
)
def test_parts_of_one_message(processes, dtype, width, fp8):
    processes.run(parts_of_one_message, dtype, width, fp8)


# ----------------------------------------------------------------------------- wrong arguments


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def own_mistakes(rank: int) -> list[str]:
    group = dist.group.WORLD
    x = torch.zeros(4, 2)
    calls = ([1, 1, 1, 1], [1, 1, 1, 2]), ([4, 0, 0], [1, 1, 1, 1]), ([5, 0, 0, -1], [4, 0, 0, 0])
    return [message_of(lambda c=c: all_to_all_rows(x, *c, group)) for c in calls]


def test_own_mistakes_are_found_without_the_others(processes):
    for messages in processes.run(own_mistakes):
        assert messages == [
            "all_to_all_rows: send must sum to the 4 rows of x, got [1, 1, 1, 2].",
            "all_to_all_rows: recv must be 4 numbers of at least 0, got [4, 0, 0].",
            "all_to_all_rows: recv must be 4 numbers of at least 0, got [5, 0, 0, -1].",
        ]


def mistakes_of_others(rank: int) -> list[str]:
    """Each would end the processes or hang. Those behind them show that the group still works."""
    group = dist.group.WORLD
    assert set_check_splits(True) is False
    try:
        even = [1] * 4
        three = rank == 3

        def exchange(x: Tensor, send: list[int] = even) -> Any:
            return all_to_all_rows(x, even, send, group)

        calls: list[Callable[[], Any]] = [
            # Rank 3 sends 2 rows to rank 0, which expects 1.
            lambda: exchange(torch.zeros(5 if three else 4, 2), [2, 1, 1, 1] if three else even),
            # Rank 3's splits do not fit its own rows.
            lambda: exchange(torch.zeros(4, 2), [3, 1, 1, 1] if three else even),
            # Rank 3's rows have another width, or another type.
            lambda: exchange(torch.zeros(4, 3 if three else 2)),
            lambda: exchange(torch.zeros(4, 2, dtype=torch.float64 if three else None)),
            lambda: exchange_counts(torch.zeros(4, 3 if three else 2), group),
            lambda: comm.begin_all_gather_rows(torch.zeros(3 if three else 2, 2), group),
            lambda: comm.reduce_scatter_rows(torch.zeros(12 if three else 8, 2), group),
        ]
        found = [message_of(call) for call in calls]
        exchange_everything(rank)
        equal_sizes(rank)
    finally:
        set_check_splits(False)
    return found


def test_mistakes_are_one_sentence_on_every_rank(processes):
    found = processes.run(mistakes_of_others)
    same = "must be {} as on rank 0, got {} on rank 3."
    elements = "all_to_all_rows: rows of so many elements and bytes an element"
    shape = "rows, elements of a row and bytes of an element"
    for rank, messages in enumerate(found):
        own = (
            "all_to_all_rows: send must sum to the 4 rows of x, got [3, 1, 1, 1]."
            if rank == 3
            else "all_to_all_rows: recv and send must fit the rows of each rank, got others on "
            "rank 3."
        )
        assert messages == [
            "all_to_all_rows: send must be what the other rank has in recv, got 2 rows from rank 3 "
            "to rank 0, which expects 1.",
            own,
            f"{elements} {same.format([2, 4], [3, 4])}",
            f"{elements} {same.format([2, 4], [2, 8])}",
            f"exchange_counts: rows of so many elements and bytes an element "
            f"{same.format([2, 4], [3, 4])}",
            f"all_gather_rows: {shape} {same.format([2, 2, 4], [3, 2, 4])}",
            f"reduce_scatter_rows: {shape} {same.format([8, 2, 4], [12, 2, 4])}",
        ]
