from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import ID_DTYPES, as_strided_copy, assert_identical, poisoned, short

OP_CASES = {
    "sort_by_expert": OpCase(
        lambda s: {"topk_ids": s.ids(), "num_experts": s.e},
        free_dims={"topk_ids": {0, 1}},
        bad_arguments={"num_experts": (-1, -(2**40), -(2**63))},
        kind="integer",
    )
}
LARGER = (
    Routing(1000, 7, 3, "dropped"),
    Routing(257, 129, 5, "out_of_range", torch.int64),
    Routing(4099, 2, 1, "uniform"),
    Routing(97, 1000, 8, "skewed", torch.int64),
    Routing(3, 4097, 2, "uniform"),
    Routing(1025, 64, 8, "half_empty"),
)
NAMES = ("expert_offsets", "row_to_slot", "slot_to_row")


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS + LARGER, ids=str)
def test_values(routing):
    ids = routing.ids()
    expected = reference.sort_by_expert(ids, routing.num_experts)
    with poisoned(*expected):
        actual = moe_ops.sort_by_expert(ids, routing.num_experts)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize("routing", ROUTINGS + LARGER, ids=str)
def test_invariants(routing):
    """The contract itself, without the reference: sorted, stable, inverse, counted."""
    ids, e = routing.ids(), routing.num_experts
    offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, e)
    flat = ids.reshape(-1).long()
    valid = (flat >= 0) & (flat < e)
    assert offsets[0] == 0
    assert offsets[-1] == valid.sum()
    assert torch.equal(offsets.diff().long(), torch.bincount(flat[valid], minlength=e))
    assert torch.equal(row_to_slot.long()[slot_to_row.long().view(-1)], torch.arange(len(flat)))
    # Key and slot together rise strictly: sorted by expert, slot order within, the tail last.
    key = torch.where(valid, flat, e)[row_to_slot.long()] * (len(flat) + 1) + row_to_slot
    assert bool((key.diff() > 0).all())


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last", "expanded"])
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
def test_views(view, id_dtype):
    ids = as_strided_copy(Routing(37, 6, 3, "dropped", id_dtype).ids(), view)
    expected = reference.sort_by_expert(ids.contiguous(), 6)
    for name, a, b in zip(NAMES, moe_ops.sort_by_expert(ids, 6), expected, strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), -(2**63), 2**63 - 1, 4, -1])
def test_wide_ids_are_not_cut_to_32_bits(value):
    ids = torch.tensor([[value, 1]])
    offsets, row_to_slot, _ = moe_ops.sort_by_expert(ids, 4)
    assert offsets.tolist() == [0, 0, 1, 1, 1]
    assert row_to_slot.tolist() == [1, 0]


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_tokens", [1, 100, 5000])
def test_same_bits_for_any_thread_count(num_tokens, set_threads):
    ids = Routing(num_tokens, 16, 4, "dropped").ids()
    set_threads(1)
    one = moe_ops.sort_by_expert(ids, 16)
    set_threads(2)
    for name, a, b in zip(NAMES, moe_ops.sort_by_expert(ids, 16), one, strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize("routing", [ROUTINGS[4], ROUTINGS[7], EMPTY_ROUTINGS[0]], ids=str)
def test_opcheck(routing):
    torch.library.opcheck(
        torch.ops.moe_ops.sort_by_expert.default, (routing.ids(), routing.num_experts)
    )


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
def test_compile(id_dtype):
    ids = Routing(19, 5, 2, "out_of_range", id_dtype).ids()
    compiled = torch.compile(
        lambda i: moe_ops.sort_by_expert(i, 5), fullgraph=True, backend="aot_eager"
    )
    for name, a, b in zip(NAMES, compiled(ids), moe_ops.sort_by_expert(ids, 5), strict=True):
        assert_identical(a, b, name)


@pytest.mark.parametrize(
    ("ids", "num_experts", "words"),
    [
        (torch.zeros(4, 2), 4, ["topk_ids", "float"]),
        (torch.zeros(4, dtype=torch.int32), 4, ["topk_ids", "[4]"]),
        (torch.zeros(4, 2, 2, dtype=torch.int32), 4, ["topk_ids", "[4, 2, 2]"]),
        (torch.zeros(4, 2, dtype=torch.int16), 4, ["topk_ids", "16"]),
        (torch.zeros(4, 2, dtype=torch.bool), 4, ["topk_ids", "bool"]),
        (torch.zeros(4, 2, dtype=torch.int32), -1, ["num_experts", "-1"]),
        (torch.zeros(4, 2, dtype=torch.int32), 0, ["num_experts", "0"]),
    ],
    ids=["float", "1d", "3d", "int16", "bool", "negative", "zero"],
)
def test_bad_input(ids, num_experts, words, bad_input):
    with bad_input("sort_by_expert", *words):
        moe_ops.sort_by_expert(ids, num_experts)
