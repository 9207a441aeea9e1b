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
    acc_dtype,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "unpermute": OpCase(
        lambda s: {
            "rows": s.float(s.n, s.h),
            "expert_offsets": s.offsets(),
            "slot_to_row": s.order().view(s.t, s.k),
            "topk_weights": s.weights(),
        },
        free_dims={"rows": {0, 1}, "expert_offsets": {0}},
        twice=True,
    )
}
HIDDEN_SIZES = (1, 3, 7, 8, 17, 31, 33, 65, 97, 129, 257)
DROPPED = Routing(29, 5, 2, "out_of_range")
WEIGHTED = ["rows", "topk_weights"]


def operands(routing, hidden_size, dtype, weights_dtype=None):
    expert_offsets, _, slot_to_row = routing.sorted()
    weights = torch.rand(routing.num_tokens, routing.top_k) + 0.1
    return {
        "rows": torch.randn(routing.num_slots, hidden_size).to(dtype),
        "expert_offsets": expert_offsets,
        "slot_to_row": slot_to_row,
        "topk_weights": weights.to(weights_dtype or acc_dtype(dtype)),
    }


def check(call, wrt, sum_length=2, **kwargs):
    # The gradient of a weight is a dot product over H.
    sum_length = max(sum_length, call["rows"].shape[1] if "topk_weights" in wrt else 1)
    check_against_reference(
        moe_ops.unpermute, reference.unpermute, call, wrt, sum_length=sum_length, **kwargs
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_weighted(routing, dtype):
    check(operands(routing, 19, dtype), WEIGHTED, sum_length=max(1, routing.top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_unweighted(routing, dtype):
    call = operands(routing, 19, dtype)
    del call["topk_weights"]
    check(call, ["rows"], sum_length=max(1, routing.top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_hidden_sizes(hidden_size, dtype):
    check(operands(DROPPED, hidden_size, dtype), WEIGHTED)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weights_of_any_dtype(dtype, weights_dtype):
    """The weights enter the fp32 sum (fp64 for fp64 rows); their gradient has their dtype."""
    call = operands(DROPPED, 11, dtype, weights_dtype)
    # fp64 weights of narrower rows may be used in fp32: make them exact there.
    call["topk_weights"] = call["topk_weights"].float().to(weights_dtype)
    call["topk_weights"] = call["topk_weights"].to(acc_dtype(dtype)).to(weights_dtype)
    coarse = weights_dtype == torch.float64 and dtype != torch.float64
    wrt = ["rows"] if coarse else WEIGHTED
    check(call, wrt)


@pytest.mark.parametrize("grad_view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_views(view, grad_view):
    call = operands(DROPPED, 33, torch.float32)
    call["rows"] = as_strided_copy(call["rows"], view)
    call["topk_weights"] = as_strided_copy(call["topk_weights"], view)
    check(call, WEIGHTED, grad_view=grad_view)


@pytest.mark.parametrize("view", ["transposed", "step2", "step2_last", "offset"])
def test_index_views(view):
    call = operands(DROPPED, 16, torch.bfloat16)
    call["slot_to_row"] = as_strided_copy(call["slot_to_row"], view)
    check(call, WEIGHTED)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sums_in_slot_order(dtype):
    """Large and small rows whose sum depends on the order: fp32, slot after slot."""
    acc = acc_dtype(dtype)
    ids = torch.tensor([[3, 0, 2, 1]])
    expert_offsets, _, slot_to_row = reference.sort_by_expert(ids, 4)
    slots = torch.tensor([4096.0, 2.0**-13, -4096.0, 2.0**-12], dtype=dtype)
    rows = torch.empty(4, 1, dtype=dtype)
    rows[slot_to_row[0].long(), 0] = slots
    total = torch.zeros((), dtype=acc)
    for value in slots:
        total = total + value.to(acc)
    actual = moe_ops.unpermute(rows, expert_offsets, slot_to_row)
    assert_identical(actual, total.to(dtype).view(1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rounds_once(dtype):
    """A sum in the rows' own half type would lose every small term."""
    num = 64
    ids = torch.zeros(1, num, dtype=torch.int32)
    expert_offsets, _, slot_to_row = reference.sort_by_expert(ids, 1)
    rows = torch.full((num, 3), 2.0**-9, dtype=dtype)
    rows[0] = 1.0
    expected = torch.full((1, 3), 1 + 63 * 2.0**-9, dtype=torch.float64).to(dtype)
    assert_identical(moe_ops.unpermute(rows, expert_offsets, slot_to_row), expected)


def random_map(shape, num_rows, id_dtype):
    """About a third of the rows named by no slot, others by several."""
    return torch.randint(num_rows, shape).to(id_dtype)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("hidden_size", [9, 64, 600])
def test_rows_that_several_slots_name_or_none(hidden_size, dtype, id_dtype, weighted):
    """A row's gradient is the sum of its slots', zero where there are none."""
    routing = Routing(31, 5, 3, "dropped")
    call = operands(routing, hidden_size, dtype)
    call["slot_to_row"] = random_map((31, 3), routing.num_slots, id_dtype)
    assert call["slot_to_row"].unique().numel() < 80
    if not weighted:
        del call["topk_weights"]
    check(call, [name for name in WEIGHTED if name in call], sum_length=8)


@pytest.mark.parametrize("row", [0, 40, 89])
def test_one_row_for_all_slots(row):
    """Row 89 has no expert: slots that lead there add nothing, and nothing comes back."""
    call = operands(Routing(45, 5, 2, "dropped"), 24, torch.float32)
    assert 40 < int(call["expert_offsets"][-1]) < 89
    call["slot_to_row"] = torch.full((45, 2), row, dtype=torch.int32)
    check(call, WEIGHTED, sum_length=90)


def test_rows_of_a_map_with_repeats_in_slot_order():
    """A sum whose value depends on the order: fp32, slot after slot."""
    values = torch.tensor([4096.0, 2.0**-13, -4096.0, 2.0**-12])
    rows = torch.zeros(4, 1, requires_grad=True)
    slot_to_row = torch.full((4, 1), 2, dtype=torch.int32)
    y = moe_ops.unpermute(rows, torch.tensor([0, 4], dtype=torch.int32), slot_to_row)
    (grad,) = torch.autograd.grad(y, rows, values[:, None])
    total = torch.zeros(())
    for value in values:
        total = total + value
    assert grad[:, 0].tolist() == [0, 0, total.item(), 0]


def fewer_or_more_rows(num_rows, hidden_size, dtype, id_dtype=torch.int32):
    """23 tokens of 3 slots; about a fifth have no row, and the last two rows no expert."""
    valid = max(num_rows - 2, 0)
    slot_to_row = torch.randint(-1, max(num_rows, 4), (23, 3)).clamp(max=num_rows - 1)
    slot_to_row[torch.rand(23, 3) < 0.2] = -1
    return {
        "rows": torch.randn(num_rows, hidden_size).to(dtype),
        "expert_offsets": torch.tensor([0, valid // 2, valid], dtype=torch.int32),
        "slot_to_row": slot_to_row.to(id_dtype),
        "topk_weights": torch.rand(23, 3).to(acc_dtype(dtype)) + 0.1,
    }


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 30, 68, 69, 70, 140])
def test_any_number_of_rows(num_rows, dtype, weighted):
    """Fewer rows than slots, more, or none; a row of -1 adds nothing and gets no gradient."""
    call = fewer_or_more_rows(num_rows, 19, dtype, ID_DTYPES[num_rows % 2])
    if not weighted:
        del call["topk_weights"]
    check(call, [name for name in WEIGHTED if name in call], sum_length=69)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=short)
def test_rows_without_slots(dtype):
    """T = 0 and K = 0: every row's gradient is zero."""
    for shape in ((0, 3), (5, 0)):
        call = fewer_or_more_rows(7, 5, dtype)
        call["slot_to_row"] = torch.zeros(shape, dtype=torch.int32)
        call["topk_weights"] = torch.zeros(shape)
        check(call, ["rows"])


@pytest.mark.slow_on_simulator
def test_gradcheck_of_any_number_of_rows():
    for num_rows in (7, 80):
        call = fewer_or_more_rows(num_rows, 2, torch.float64)
        index = call["expert_offsets"], call["slot_to_row"]
        inputs = (call["rows"].requires_grad_(), call["topk_weights"].requires_grad_())

        def fn(rows, weights, index=index):
            return moe_ops.unpermute(rows, *index, weights)

        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_of_a_slot_without_a_row_stays_out(dtype):
    call = fewer_or_more_rows(12, 9, dtype)
    missing = call["slot_to_row"] < 0
    call["topk_weights"][missing] = torch.nan
    call["rows"][10:] = torch.nan
    leaves = [call[name].requires_grad_() for name in WEIGHTED]
    y = moe_ops.unpermute(**call)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert not y.isnan().any()
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[1][missing] == 0).all())


@pytest.mark.parametrize("num_rows", [5, 100])
def test_opcheck_of_any_number_of_rows(num_rows):
    call = fewer_or_more_rows(num_rows, 7, torch.float32)
    call["rows"].requires_grad_()
    torch.library.opcheck(torch.ops.moe_ops.unpermute.default, tuple(call.values()))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_of_the_tail_stays_out(dtype, weighted):
    call = operands(Routing(11, 4, 2, "dropped"), 9, dtype)
    end = int(call["expert_offsets"][-1])
    assert 0 < end < 22
    call["rows"][end:] = torch.nan
    call["topk_weights"][call["slot_to_row"] >= end] = torch.nan
    if not weighted:
        del call["topk_weights"]
    wrt = [name for name in WEIGHTED if name in call]
    leaves = {name: call[name].requires_grad_() for name in wrt}
    y = moe_ops.unpermute(**call)
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert not y.isnan().any()
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[0][end:] == 0).all())


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("routing", [ROUTINGS[1], ROUTINGS[6], ROUTINGS[12]], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_gradcheck(routing, weighted):
    call = operands(routing, 3, torch.float64)
    index = (call["expert_offsets"], call["slot_to_row"])
    inputs = (call["rows"].requires_grad_(),)
    if weighted:
        inputs += (call["topk_weights"].requires_grad_(),)

    def fn(rows, weights=None):
        return moe_ops.unpermute(rows, *index, weights)

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


def test_gradcheck_of_a_map_with_repeats():
    call = operands(Routing(7, 4, 2, "dropped"), 3, torch.float64)
    call["slot_to_row"] = random_map((7, 2), 14, torch.int32)

    def fn(rows, weights):
        return moe_ops.unpermute(rows, call["expert_offsets"], call["slot_to_row"], weights)

    inputs = (call["rows"].requires_grad_(), call["topk_weights"].requires_grad_())
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, weighted):
    call = operands(DROPPED, 7, dtype)
    call["rows"].requires_grad_(requires_grad)
    call["topk_weights"].requires_grad_(requires_grad)
    if not weighted:
        call["topk_weights"] = None
    torch.library.opcheck(torch.ops.moe_ops.unpermute.default, tuple(call.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_compile(dtype):
    call = operands(DROPPED, 12, dtype)
    leaves = [call["rows"].requires_grad_(), call["topk_weights"].requires_grad_()]
    compiled = torch.compile(moe_ops.unpermute, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.unpermute(**call)
    assert_identical(got, want)
    grad = torch.randn(want.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_autocast_keeps_rows_and_weights(dtype):
    """Rounding the fp32 routing weights to bf16 would lose what the router computed."""
    call = operands(DROPPED, 8, dtype)
    want = moe_ops.unpermute(**call)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_identical(moe_ops.unpermute(**call), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(Routing(700, 8, 3, "dropped"), 129, dtype)
    leaves = [call["rows"].requires_grad_(), call["topk_weights"].requires_grad_()]
    grad = torch.randn(700, 129).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y = moe_ops.unpermute(**call)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.zeros(12, 2, 1)}, ["rows", "[12, 2, 1]"]),
        ({"rows": torch.zeros(12, 2, dtype=torch.int64)}, ["rows", "int64"]),
        ({"expert_offsets": torch.zeros(5)}, ["expert_offsets", "float32"]),
        ({"expert_offsets": torch.zeros(5, 1, dtype=torch.int32)}, ["expert_offsets", "[5, 1]"]),
        ({"slot_to_row": torch.zeros(6, 2)}, ["slot_to_row", "float32"]),
        ({"slot_to_row": torch.zeros(12, dtype=torch.int32)}, ["slot_to_row", "[12]"]),
        ({"topk_weights": torch.zeros(6, 3)}, ["topk_weights", "[6, 3]"]),
        ({"topk_weights": torch.zeros(7, 2)}, ["topk_weights", "[7, 2]"]),
        ({"topk_weights": torch.zeros(12)}, ["topk_weights", "[12]"]),
        ({"topk_weights": torch.zeros(6, 2, dtype=torch.int32)}, ["topk_weights", "int32"]),
    ],
    ids=lambda v: v[0] + "-" + v[1] if isinstance(v, list) else "",
)
def test_bad_input(change, words, bad_input):
    call = operands(Routing(6, 4, 2), 2, torch.float32)
    with bad_input("unpermute", *words):
        moe_ops.unpermute(**{**call, **change})


@pytest.mark.cpu_only
@pytest.mark.parametrize("value", [-2, 12, 2**31 - 1, -(2**31)])
def test_row_out_of_range(value, bad_input):
    call = operands(Routing(6, 4, 2), 2, torch.float32)
    call["slot_to_row"][3, 1] = value
    with bad_input("unpermute", "slot_to_row", str(value)):
        moe_ops.unpermute(**call)
