from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    DTYPES,
    ID_DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    poisoned,
    short,
)

OP_CASES = {
    "permute": OpCase(
        lambda s: {
            "x": s.float(s.t, s.h),
            "expert_offsets": s.offsets(),
            "row_to_slot": s.order(),
        },
        free_dims={"x": {1}, "expert_offsets": {0}},
        bad_arguments={"top_k": (0, -1, -(2**63), 2**31, 2**63 - 1)},
        twice=True,
    )
}
HIDDEN_SIZES = (1, 3, 7, 8, 17, 31, 33, 65, 97, 129, 257)
DROPPED = Routing(29, 5, 2, "out_of_range")


def operands(routing, hidden_size, dtype):
    expert_offsets, row_to_slot, _ = routing.sorted()
    x = torch.randn(routing.num_tokens, hidden_size).to(dtype)
    return {"x": x, "expert_offsets": expert_offsets, "row_to_slot": row_to_slot}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_copies_exactly(routing, dtype):
    call = operands(routing, 19, dtype)
    expected = reference.permute(**call)
    with poisoned(expected):
        assert_identical(moe_ops.permute(**call), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_gradient(hidden_size, dtype):
    call = operands(DROPPED, hidden_size, dtype)
    check_against_reference(moe_ops.permute, reference.permute, call, ["x"], sum_length=2)


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_gradient_of_routing(routing):
    call = operands(routing, 5, torch.float32)
    check_against_reference(
        moe_ops.permute, reference.permute, call, ["x"], sum_length=max(1, routing.top_k)
    )


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("hidden_size", [9, 64, 600])
def test_slots_that_several_rows_name_or_none(hidden_size, dtype, id_dtype):
    """A token's gradient is the sum of all rows that are copies of it."""
    call = operands(Routing(31, 5, 3, "dropped"), hidden_size, dtype)
    call["row_to_slot"] = torch.randint(93, (93,)).to(id_dtype)
    assert call["row_to_slot"].unique().numel() < 80
    check_against_reference(moe_ops.permute, reference.permute, call, ["x"], sum_length=12)


def fewer_or_more_rows(num_rows, top_k, hidden_size, dtype, num_tokens=23):
    """About a fifth of the rows have no slot, and the last two no expert."""
    valid = max(num_rows - 2, 0)
    row_to_slot = torch.randint(-1, max(num_tokens * top_k, 1), (num_rows,))
    row_to_slot[torch.rand(num_rows) < 0.2] = -1
    if num_tokens == 0:
        row_to_slot[:] = -1
    return {
        "x": torch.randn(num_tokens, hidden_size).to(dtype),
        "expert_offsets": torch.tensor([0, valid // 2, valid], dtype=torch.int32),
        "row_to_slot": row_to_slot.to(ID_DTYPES[num_rows % 2]),
        "top_k": top_k,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 22, 23, 24, 69, 70, 140])
def test_any_number_of_rows(num_rows, top_k, dtype):
    call = fewer_or_more_rows(num_rows, top_k, 19, dtype)
    check_against_reference(moe_ops.permute, reference.permute, call, ["x"], sum_length=40)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_rows_without_tokens(num_rows):
    call = fewer_or_more_rows(num_rows, 2, 5, torch.float32, num_tokens=0)
    with poisoned(torch.zeros(num_rows, 5)):
        assert_identical(moe_ops.permute(**call), torch.zeros(num_rows, 5))


def test_gradcheck_of_any_number_of_rows():
    for num_rows in (7, 80):
        call = fewer_or_more_rows(num_rows, 2, 2, torch.float64)
        x = call.pop("x").requires_grad_()
        assert torch.autograd.gradcheck(lambda t, call=call: moe_ops.permute(t, **call), x)
        assert torch.autograd.gradgradcheck(lambda t, call=call: moe_ops.permute(t, **call), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_gradient_of_a_row_without_a_slot_stays_out(dtype):
    call = fewer_or_more_rows(30, 3, 9, dtype)
    x = call["x"].requires_grad_()
    rows = moe_ops.permute(**call)
    grad = torch.ones_like(rows)
    grad[call["row_to_slot"] < 0] = torch.nan
    assert not torch.autograd.grad(rows, x, grad)[0].isnan().any()


@pytest.mark.parametrize("num_rows", [5, 100])
def test_opcheck_of_any_number_of_rows(num_rows):
    call = fewer_or_more_rows(num_rows, 3, 7, torch.float32)
    call["x"].requires_grad_()
    torch.library.opcheck(torch.ops.moe_ops.permute.default, tuple(call.values()))


@pytest.mark.parametrize("slot", [0, 77, 89])
def test_one_slot_for_all_rows(slot):
    """40 slots per token: two batches of lanes."""
    call = operands(Routing(3, 50, 40, "dropped"), 24, torch.float32)
    call["row_to_slot"] = torch.full((120,), slot, dtype=torch.int32)
    check_against_reference(moe_ops.permute, reference.permute, call, ["x"], sum_length=120)


def test_repeated_rows_in_order():
    """A sum whose value depends on the order: fp32, by slot, then by row."""
    values = torch.tensor([2.0**-13, 4096.0, -4096.0, 2.0**-12])
    x = torch.zeros(2, 1, requires_grad=True)
    row_to_slot = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    rows = moe_ops.permute(x, torch.tensor([0, 4], dtype=torch.int32), row_to_slot)
    (grad,) = torch.autograd.grad(rows, x, values[:, None])
    total = torch.zeros(())
    for row in (1, 2, 0, 3):
        total = total + values[row]
    assert grad[:, 0].tolist() == [total.item(), 0]


@pytest.mark.parametrize("grad_view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_views(view, grad_view):
    call = operands(DROPPED, 33, torch.float32)
    call["x"] = as_strided_copy(call["x"], view)
    check_against_reference(
        moe_ops.permute, reference.permute, call, ["x"], sum_length=2, grad_view=grad_view
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_index_views(dtype):
    call = operands(DROPPED, 16, dtype)
    expected = reference.permute(**call)
    call["expert_offsets"] = as_strided_copy(call["expert_offsets"], "step2")
    call["row_to_slot"] = as_strided_copy(call["row_to_slot"], "step2")
    assert_identical(moe_ops.permute(**call), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_of_a_dropped_token_stays_out(dtype):
    ids = torch.tensor([[0, 1], [-1, -1], [1, 0]], dtype=torch.int32)
    x = torch.randn(3, 9).to(dtype)
    x[1] = torch.nan
    expert_offsets, row_to_slot, _ = reference.sort_by_expert(ids, 2)
    rows = moe_ops.permute(x, expert_offsets, row_to_slot)
    assert not rows.isnan().any()
    assert bool((rows[4:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_gradient_of_a_tail_row_stays_out(dtype):
    call = operands(Routing(11, 4, 2, "dropped"), 9, dtype)
    x = call["x"].requires_grad_()
    rows = moe_ops.permute(x, call["expert_offsets"], call["row_to_slot"])
    grad = torch.ones_like(rows)
    grad[int(call["expert_offsets"][-1]) :] = torch.nan
    (grad_x,) = torch.autograd.grad(rows, x, grad)
    assert not grad_x.isnan().any()


@pytest.mark.parametrize("routing", [ROUTINGS[1], ROUTINGS[6], ROUTINGS[12]], ids=str)
def test_gradcheck(routing):
    call = operands(routing, 3, torch.float64)
    x = call.pop("x").requires_grad_()
    assert torch.autograd.gradcheck(lambda t: moe_ops.permute(t, **call), x)
    assert torch.autograd.gradgradcheck(lambda t: moe_ops.permute(t, **call), x)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad):
    call = operands(DROPPED, 7, dtype)
    call["x"].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.permute.default, tuple(call.values()))


@pytest.mark.parametrize("routing", EMPTY_ROUTINGS[:1], ids=str)
def test_opcheck_empty(routing):
    call = operands(routing, 7, torch.float32)
    torch.library.opcheck(torch.ops.moe_ops.permute.default, tuple(call.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_compile(dtype):
    call = operands(DROPPED, 12, dtype)
    x = call.pop("x").requires_grad_()
    compiled = torch.compile(
        lambda t: moe_ops.permute(t, **call), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(x), moe_ops.permute(x, **call)
    assert_identical(got, want)
    grad = torch.randn(want.shape).to(dtype)
    assert_identical(
        *(torch.autograd.grad(y, x, grad)[0] for y in (got, want)), what="gradient of x"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_autocast_moves_rows_as_they_are(dtype):
    call = operands(DROPPED, 8, dtype)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert moe_ops.permute(**call).dtype == dtype


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(Routing(700, 8, 3, "dropped"), 129, dtype)
    x = call.pop("x").requires_grad_()
    grad = torch.randn(2100, 129).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        rows = moe_ops.permute(x, **call)
        runs.append((rows, torch.autograd.grad(rows, x, grad)[0]))
    for rows, grad_x in runs[1:]:
        assert_identical(rows, runs[0][0])
        assert_identical(grad_x, runs[0][1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(6, 2, 2)}, ["x", "[6, 2, 2]"]),
        ({"x": torch.zeros(6)}, ["x", "[6]"]),
        ({"x": torch.zeros(6, 2, dtype=torch.int32)}, ["x", "int32"]),
        ({"x": torch.zeros(6, 2, dtype=torch.complex64)}, ["x", "complex64"]),
        ({"expert_offsets": torch.zeros(5)}, ["expert_offsets", "float32"]),
        ({"expert_offsets": torch.zeros(5, 1, dtype=torch.int32)}, ["expert_offsets", "[5, 1]"]),
        ({"row_to_slot": torch.zeros(12)}, ["row_to_slot", "float32"]),
        ({"row_to_slot": torch.zeros(12, 1, dtype=torch.int32)}, ["row_to_slot", "[12, 1]"]),
        ({"row_to_slot": torch.zeros(13, dtype=torch.int32)}, ["row_to_slot", "13"]),
        ({"row_to_slot": torch.zeros(12, dtype=torch.int16)}, ["row_to_slot", "int16"]),
    ],
    ids=lambda v: v[0] + "-" + v[1] if isinstance(v, list) else "",
)
def test_bad_input(change, words, bad_input):
    call = operands(Routing(6, 4, 2), 2, torch.float32)
    with bad_input("permute", *words):
        moe_ops.permute(**{**call, **change})


@pytest.mark.cpu_only
@pytest.mark.parametrize("value", [-2, 12, 2**31 - 1, -(2**31)])
def test_slot_out_of_range(value, bad_input):
    """An index is checked before it is followed: nothing outside x is read."""
    call = operands(Routing(6, 4, 2), 2, torch.float32)
    call["row_to_slot"][3] = value
    with bad_input("permute", "row_to_slot", str(value)):
        moe_ops.permute(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "offsets", [[0, 3, 6, 9, 13], [0, 9, 3, 12, 12], [1, 3, 6, 9, 12], [0, -1, 3, 6, 12]]
)
def test_offsets_out_of_order(offsets, bad_input):
    call = operands(Routing(6, 4, 2), 2, torch.float32)
    call["expert_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    with bad_input("permute", "expert_offsets"):
        moe_ops.permute(**call)
