from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import ID_DTYPES, as_strided_copy, assert_identical, poisoned, short

BAD_NUMBERS = (0, -1, -(2**40), -(2**63), 2**31, 2**40, 2**63 - 1)
OP_CASES = {
    "dispatch_layout": OpCase(
        lambda s: {
            "topk_ids": s.ids(),
            "num_ranks": 3,
            "experts_per_rank": s.h,
            "physical": torch.randint(-1, 3 * s.h, (s.e,)).to(s.id_dtype),
        },
        free_dims={"topk_ids": {0, 1}, "physical": {0}},
        bad_arguments={"num_ranks": BAD_NUMBERS, "experts_per_rank": BAD_NUMBERS},
        kind="integer",
    )
}
NAMES = ("rank_offsets", "row_to_token", "slot_to_row", "local_ids")
# Of routings with E experts: how many of them a rank has. Ids from n * E_l on are of no rank.
ON_A_RANK = {1: 1, 3: 1, 4: 2, 5: 2, 6: 6, 8: 3, 16: 4, 64: 9}
LARGER = (
    Routing(1000, 16, 3, "dropped"),
    Routing(257, 128, 8, "out_of_range", torch.int64),
    Routing(1500, 64, 8, "skewed"),
    Routing(40, 12, 40, "repeated"),
    Routing(3, 4000, 50, "uniform", torch.int64),
)


def layout(routing):
    """num_ranks and experts_per_rank."""
    per_rank = ON_A_RANK.get(routing.num_experts, 4)
    return max(1, routing.num_experts // per_rank), per_rank


def plan_by_hand(ids, num_ranks, experts_per_rank, physical=None):
    """The contract in loops."""
    rows = [[] for _ in range(num_ranks)]
    slot_to_row = [[-1] * ids.shape[1] for _ in range(ids.shape[0])]
    firsts = []
    for t, chosen in enumerate(ids.tolist()):
        experts = []
        for i in chosen:
            table = range(num_ranks * experts_per_rank) if physical is None else physical.tolist()
            e = table[i] if 0 <= i < len(table) else -1
            experts.append(e if 0 <= e < num_ranks * experts_per_rank else -1)
        seen = set()
        for k, e in enumerate(experts):
            rank = e // experts_per_rank
            if e < 0 or rank in seen:
                continue
            seen.add(rank)
            first = rank * experts_per_rank
            local = [i - first if 0 <= i - first < experts_per_rank else -1 for i in experts]
            firsts.append((t, k, rank, len(rows[rank])))
            rows[rank].append((t, local))
    counts = [len(of_rank) for of_rank in rows]
    offsets = [sum(counts[:r]) for r in range(num_ranks + 1)]
    for t, k, rank, place in firsts:
        slot_to_row[t][k] = offsets[rank] + place
    flat = [row for of_rank in rows for row in of_rank]
    unused = ids.shape[0] * min(ids.shape[1], num_ranks) - len(flat)
    flat += [(-1, [-1] * ids.shape[1])] * unused
    return offsets, [t for t, _ in flat], slot_to_row, [local for _, local in flat]


def check(ids, *arguments):
    expected = reference.dispatch_layout(ids, *arguments)
    with poisoned(*expected):
        actual = moe_ops.dispatch_layout(ids, *arguments)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_identical(a, b, name)
    return actual


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS + LARGER, ids=str)
def test_values(routing):
    check(routing.ids(), *layout(routing))


@pytest.mark.parametrize("table_dtype", ID_DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS + LARGER[:2], ids=str)
def test_values_of_physical_experts(routing, table_dtype):
    """Two experts with copies, in another order; some logical ones have none."""
    num_ranks, per_rank = layout(routing)
    num_physical = num_ranks * per_rank
    physical = torch.randint(num_physical, (routing.num_experts,)).to(table_dtype)
    physical[torch.rand(routing.num_experts) < 0.2] = -1
    physical[-1] = num_physical
    check(routing.ids(), num_ranks, per_rank, physical)


@pytest.mark.parametrize("with_table", [False, True], ids=["logical", "physical"])
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_contract(routing, with_table):
    ids, arguments = routing.ids(), layout(routing)
    if with_table:
        arguments += (torch.randint(-1, arguments[0] * arguments[1], (routing.num_experts,)),)
    actual = moe_ops.dispatch_layout(ids, *arguments)
    for name, a, b in zip(NAMES, actual, plan_by_hand(ids, *arguments), strict=True):
        assert a.tolist() == b, name


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_experts_behind_an_exchange_sum_to_the_whole(num_ranks):
    """A rank calls moe_ffn with what it gets; gradients come back the same way."""
    routing = Routing(37, 8, 3, "dropped")
    t, e, k, h, i = 37, 8, 3, 10, 6
    ids = routing.ids()
    x, up, down, weights = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((t, h), (e, 2 * i, h), (e, h, i), (t, k))
    )
    want = reference.moe_ffn(x, up, down, weights, ids)

    offsets, row_to_token, slot_to_row, local_ids = moe_ops.dispatch_layout(
        ids, num_ranks, e // num_ranks
    )
    cuts = offsets.tolist()
    rows = moe_ops.permute(x, offsets, row_to_token[: cuts[-1]], top_k=1)
    row_weights = moe_ops.permute(weights, offsets, row_to_token[: cuts[-1]], top_k=1)
    parts = []
    for rank in range(num_ranks):
        here, experts = (
            slice(cuts[rank], cuts[rank + 1]),
            slice(rank * e // num_ranks, (rank + 1) * e // num_ranks),
        )
        parts.append(
            moe_ops.moe_ffn(
                rows[here], up[experts], down[experts], row_weights[here], local_ids[here]
            )
        )
    y = moe_ops.unpermute(torch.cat(parts), offsets, slot_to_row)
    torch.testing.assert_close(y, want)
    grad, leaves = torch.randn_like(want), (x, up, down, weights)
    for a, b in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last", "expanded"])
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
def test_views(view, id_dtype):
    ids = as_strided_copy(Routing(37, 6, 3, "dropped", id_dtype).ids(), view)
    physical = as_strided_copy(torch.randperm(6).to(id_dtype), view)
    expected = reference.dispatch_layout(ids.contiguous(), 3, 2, physical.contiguous())
    actual = moe_ops.dispatch_layout(ids, 3, 2, physical)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), -(2**63), 2**63 - 1, 4, -1])
def test_wide_numbers_are_not_cut_to_32_bits(value):
    for arguments in (
        (torch.tensor([[value, 1]]), 2, 2),
        (torch.tensor([[0, 1]]), 2, 2, torch.tensor([value, 1])),
    ):
        offsets, row_to_token, slot_to_row, local_ids = moe_ops.dispatch_layout(*arguments)
        assert offsets.tolist() == [0, 1, 1]
        assert row_to_token.tolist() == [0, -1]
        assert slot_to_row.tolist() == [[-1, 0]]
        assert local_ids.tolist() == [[-1, 1], [-1, -1]]


def test_no_logical_experts():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    offsets, row_to_token, *_ = check(ids, 2, 2, torch.zeros(0, dtype=torch.int32))
    assert offsets.tolist() == [0, 0, 0]
    assert row_to_token.tolist() == [-1] * 6


def test_more_experts_than_ids():
    """One rank of very many experts: numbers close to 2^31."""
    ids = torch.tensor([[2**31 - 2, 0]])
    *_, local_ids = check(ids, 1, 2**31 - 1)
    assert local_ids.tolist() == [[2**31 - 2, 0]]


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_tokens", [1, 100, 5000])
def test_same_bits_for_any_thread_count(num_tokens, set_threads):
    ids = Routing(num_tokens, 64, 8, "dropped").ids()
    set_threads(1)
    one = moe_ops.dispatch_layout(ids, 16, 4)
    set_threads(2)
    for name, a, b in zip(NAMES, moe_ops.dispatch_layout(ids, 16, 4), one, strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize("routing", [ROUTINGS[4], ROUTINGS[7], EMPTY_ROUTINGS[0]], ids=str)
def test_opcheck(routing):
    physical = torch.arange(routing.num_experts).flip(0)
    for arguments in (layout(routing), (*layout(routing), physical)):
        torch.library.opcheck(
            torch.ops.moe_ops.dispatch_layout.default, (routing.ids(), *arguments)
        )


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
def test_compile(id_dtype):
    ids = Routing(19, 6, 2, "out_of_range", id_dtype).ids()
    compiled = torch.compile(
        lambda i: moe_ops.dispatch_layout(i, 3, 2), fullgraph=True, backend="aot_eager"
    )
    for name, a, b in zip(NAMES, compiled(ids), moe_ops.dispatch_layout(ids, 3, 2), strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_ids": torch.zeros(4, 2)}, ["topk_ids", "float"]),
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, ["topk_ids", "[4]"]),
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int16)}, ["topk_ids", "16"]),
        ({"num_ranks": 0}, ["num_ranks", "0"]),
        ({"num_ranks": -3}, ["num_ranks", "-3"]),
        ({"experts_per_rank": 0}, ["experts_per_rank", "0"]),
        ({"experts_per_rank": 2**30 + 1}, ["experts_per_rank", str(2**30 + 1)]),
        ({"physical": torch.zeros(4)}, ["physical", "float"]),
        ({"physical": torch.zeros(4, 1, dtype=torch.int32)}, ["physical", "[4, 1]"]),
    ],
    ids=lambda v: v[0] + "-" + v[1] if isinstance(v, list) else "",
)
def test_bad_input(change, words, bad_input):
    call = {"topk_ids": torch.zeros(4, 2, dtype=torch.int32), "num_ranks": 2, "experts_per_rank": 2}
    with bad_input("dispatch_layout", *words):
        moe_ops.dispatch_layout(**{**call, **change})
