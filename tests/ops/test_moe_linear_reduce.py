from __future__ import annotations

import pytest
import torch
from tests.helpers.moe_linear import ROUTINGS_OF_BLOCKS, VIEWS_OF_BLOCKS
from tests.helpers.op_case import OpCase, map_of, ones
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    acc_dtype,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "moe_linear_reduce": OpCase(
        lambda s: {
            "h": s.float(s.t, s.k, s.i),
            "w": s.float(s.e, s.h, s.i),
            "topk_weights": s.weights(),
            "topk_ids": s.ids(),
            "bias": s.float(s.e, s.h),
        },
        mixed_floats=("topk_weights",),
        too_many_bytes=lambda: moe_ops.moe_linear_reduce(
            torch.empty(2**20, 1, 0), torch.empty(1, 2**42, 0), ones(2**20, 1), map_of(2**20, 1)
        ),
    )
}
# (D, H)
SIZES = (
    (1, 1),
    (3, 7),
    (7, 3),
    (8, 16),
    (17, 31),
    (31, 17),
    (33, 65),
    (65, 33),
    (129, 5),
    (5, 257),
)
SMALL = Routing(11, 4, 2, "dropped")
FLOATS = ("h", "w", "topk_weights", "bias")


def operands(routing, head_size, hidden_size, dtype, *, bias=False):
    t, k, e = routing.num_tokens, routing.top_k, routing.num_experts
    call = {
        "h": torch.randn(t, k, head_size).to(dtype),
        "w": torch.randn(e, hidden_size, head_size).to(dtype),
        "topk_weights": torch.rand(t, k).to(acc_dtype(dtype)) + 0.1,
        "topk_ids": routing.ids(),
    }
    if bias:
        call["bias"] = torch.randn(e, hidden_size).to(dtype)
    return call


def differentiable(call):
    return [name for name in FLOATS if name in call]


def check(call, wrt=None, **kwargs):
    """Half types may round an expert's output before the weighted sum, and weight * grad_y."""
    sum_length = max(1, *call["h"].shape, *call["w"].shape, call["topk_ids"].numel())
    check_against_reference(
        moe_ops.moe_linear_reduce,
        reference.moe_linear_reduce,
        call,
        differentiable(call) if wrt is None else wrt,
        sum_length=sum_length,
        steps=1,
        grad_steps=2,
        **kwargs,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("head_size", "hidden_size"), SIZES)
def test_sizes(head_size, hidden_size, dtype, bias):
    check(operands(SMALL, head_size, hidden_size, dtype, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    check(operands(routing, 9, 12, dtype, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("head_size", "hidden_size"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(head_size, hidden_size, dtype):
    check(operands(SMALL, head_size, hidden_size, dtype, bias=True))


@pytest.mark.parametrize(("view", "dtype"), VIEWS_OF_BLOCKS)
def test_more_than_one_block_in_every_direction(view, dtype):
    call = operands(Routing(170, 2, 2, "skewed"), 270, 300, dtype, bias=True)
    call["w"] = as_strided_copy(call["w"], view)
    check(call, grad_view=view)


# Weight gradients sum an expert's rows in blocks of 192 or, of bfloat16 pairs, 384. The second
# block adds to what the first one left, while rows that carry a weight are scaled and rounded.
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("rows", [191, 193, 383, 385, 769])
def test_scaled_rows_in_more_than_one_block(dtype, rows):
    check(operands(Routing(rows, 1, 1), 8, 193, dtype))
    check(operands(Routing(rows, 2, 1, "last_only"), 130, 7, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("head_size", "hidden_size"), [(32, 64), (19, 7), (33, 128), (128, 1)])
@pytest.mark.parametrize("routing", ROUTINGS_OF_BLOCKS)
def test_narrow_experts(routing, head_size, hidden_size, dtype):
    check(operands(routing, head_size, hidden_size, dtype, bias=True))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_narrow_experts_in_views(view):
    call = operands(Routing(150, 4, 2, "dropped"), 20, 24, torch.float32, bias=True)
    call = {name: as_strided_copy(t, view) for name, t in call.items()}
    check(call, grad_view=view)


@pytest.mark.parametrize("wanted", FLOATS)
def test_narrow_experts_one_gradient_at_a_time(wanted):
    check(operands(Routing(150, 4, 2, "dropped"), 9, 12, torch.float32, bias=True), [wanted])


def test_narrow_experts_of_many_tokens():
    """More tokens than 16 chunks of 256, so that a chunk has several blocks."""
    check(operands(Routing(4500, 3, 1, "skewed"), 5, 6, torch.float32, bias=True))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", ["h", "w", "topk_weights", "bias", "topk_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, name, view):
    call = operands(SMALL, 11, 14, dtype, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_heads_kept_before_tokens(dtype):
    """h as attention leaves it, [K, T, D] in memory."""
    call = operands(SMALL, 11, 14, dtype)
    call["h"] = torch.randn(2, 11, 11).to(dtype).transpose(0, 1)
    check(call)


@pytest.mark.parametrize("wanted", FLOATS)
def test_one_gradient_at_a_time(wanted):
    check(operands(SMALL, 9, 12, torch.float32, bias=True), [wanted])


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_weights_of_any_dtype(dtype, weights_dtype):
    call = operands(SMALL, 9, 12, dtype)
    call["topk_weights"] = call["topk_weights"].to(weights_dtype)
    check(call)


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_slots_add_nothing_and_keep_nan_out(dtype, tokens):
    call = operands(Routing(tokens, 3, 2), 8, 10, dtype, bias=True)
    call["topk_ids"][4, 1] = 3
    call["topk_ids"][5] = -1
    call["h"][5] = torch.nan
    call["h"][4, 1] = torch.nan
    call["topk_weights"][5] = torch.nan
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    y = moe_ops.moe_linear_reduce(**call)
    assert bool((y[5] == 0).all())
    assert not y.isnan().any()
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[0][5] == 0).all()) and bool((grads[2][5] == 0).all())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_gradcheck(bias):
    call = operands(Routing(4, 3, 2, "dropped"), 3, 4, torch.float64, bias=bias)
    names = differentiable(call)
    inputs = tuple(call[name].requires_grad_() for name in names)

    def fn(*tensors):
        return moe_ops.moe_linear_reduce(**{**call, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(fn, inputs)


def test_double_backward_works_or_says_so():
    """The second derivative is right or refused; a silent zero would be neither."""
    call = operands(SMALL, 3, 4, torch.float64)
    h, w = call["h"].requires_grad_(), call["w"].requires_grad_()
    want = torch.autograd.grad(
        torch.autograd.grad(reference.moe_linear_reduce(**call).pow(2).sum(), h, create_graph=True)[
            0
        ].sum(),
        w,
    )[0]
    (grad,) = torch.autograd.grad(
        moe_ops.moe_linear_reduce(**call).pow(2).sum(), h, create_graph=True
    )
    try:
        (got,) = torch.autograd.grad(grad.sum(), w)
    except (NotImplementedError, RuntimeError) as error:
        assert "moe_linear_reduce" in str(error)
    else:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, bias):
    call = operands(SMALL, 5, 7, dtype, bias=bias)
    for name in differentiable(call):
        call[name].requires_grad_(requires_grad)
    keyword = {"bias": call.pop("bias", None)}
    torch.library.opcheck(
        torch.ops.moe_ops.moe_linear_reduce.default, tuple(call.values()), keyword
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    call = operands(SMALL, 6, 7, dtype, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    compiled = torch.compile(moe_ops.moe_linear_reduce, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.moe_linear_reduce(**call)
    assert_identical(got, want)
    grad = torch.randn(want.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_autocast_casts_like_a_linear(dtype):
    call = operands(SMALL, 9, 12, dtype, bias=True)
    half = {k: v.bfloat16() if k in ("h", "w", "bias") else v for k, v in call.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_linear_reduce(**call)
    assert_identical(y, moe_ops.moe_linear_reduce(**half))


@pytest.mark.parametrize(("tokens", "hidden_size"), [(200, 80), (1000, 48), (200, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, tokens, hidden_size, set_threads):
    call = operands(Routing(tokens, 8, 2, "dropped"), 64, hidden_size, dtype, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    grad = torch.randn(tokens, hidden_size).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y = moe_ops.moe_linear_reduce(**call)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"h": torch.zeros(6, 5)}, "h", "[6, 5]"),
        ({"h": torch.zeros(6, 2, 5, dtype=torch.int32)}, "h", "int32"),
        ({"w": torch.zeros(7, 5)}, "w", "[7, 5]"),
        ({"w": torch.zeros(4, 7, 6)}, "w", "6"),
        ({"w": torch.zeros(4, 7, 5, dtype=torch.float16)}, "w", "float16"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights", "[6, 3]"),
        ({"topk_weights": torch.zeros(6, 2, dtype=torch.int32)}, "topk_weights", "int32"),
        ({"topk_ids": torch.zeros(7, 2, dtype=torch.int32)}, "topk_ids", "[7, 2]"),
        ({"topk_ids": torch.zeros(6, dtype=torch.int32)}, "topk_ids", "[6]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"bias": torch.zeros(4, 8)}, "bias", "[4, 8]"),
        ({"bias": torch.zeros(4, 7, dtype=torch.bfloat16)}, "bias", "bfloat16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, name, got, bad_input):
    call = operands(Routing(6, 4, 2), 5, 7, torch.float32, bias=True)
    with bad_input("moe_linear_reduce", name, got):
        moe_ops.moe_linear_reduce(**{**call, **change})
