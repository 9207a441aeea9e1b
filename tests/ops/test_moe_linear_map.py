from __future__ import annotations

import pytest
import torch
from tests.helpers.moe_linear import ROUTINGS_OF_BLOCKS, VIEWS_OF_BLOCKS
from tests.helpers.op_case import OpCase, map_of
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "moe_linear_map": OpCase(
        lambda s: {
            "x": s.float(s.t, s.h),
            "w": s.float(s.e, s.o, s.h),
            "topk_ids": s.ids(),
            "bias": s.float(s.e, s.o),
        },
        free_dims={"topk_ids": {1}},
        mixed_floats=(),
        too_many_bytes=lambda: moe_ops.moe_linear_map(
            torch.empty(2**20, 0), torch.empty(1, 2**42, 0), map_of(2**20, 1)
        ),
    )
}
# (H, O)
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


def operands(routing, hidden_size, out_features, dtype, *, bias=False):
    e = routing.num_experts
    call = {
        "x": torch.randn(routing.num_tokens, hidden_size).to(dtype),
        "w": torch.randn(e, out_features, hidden_size).to(dtype),
        "topk_ids": routing.ids(),
    }
    if bias:
        call["bias"] = torch.randn(e, out_features).to(dtype)
    return call


def differentiable(call):
    return [name for name in ("x", "w", "bias") if name in call]


def check(call, wrt=None, **kwargs):
    """Half types may round the gradient of each slot before a token's slots are summed."""
    sum_length = max(1, *call["x"].shape, call["w"].shape[1], call["topk_ids"].numel())
    check_against_reference(
        moe_ops.moe_linear_map,
        reference.moe_linear_map,
        call,
        differentiable(call) if wrt is None else wrt,
        sum_length=sum_length,
        steps=0,
        grad_steps=1,
        **kwargs,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "out_features"), SIZES)
def test_sizes(hidden_size, out_features, dtype, bias):
    check(operands(SMALL, hidden_size, out_features, dtype, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    check(operands(routing, 9, 12, dtype, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "out_features"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(hidden_size, out_features, dtype):
    check(operands(SMALL, hidden_size, out_features, dtype, bias=True))


@pytest.mark.parametrize(("view", "dtype"), VIEWS_OF_BLOCKS)
def test_more_than_one_block_in_every_direction(view, dtype):
    call = operands(Routing(170, 2, 2, "skewed"), 270, 300, dtype, bias=True)
    call["w"] = as_strided_copy(call["w"], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "out_features"), [(64, 32), (7, 19), (128, 33), (1, 128)])
@pytest.mark.parametrize("routing", ROUTINGS_OF_BLOCKS)
def test_narrow_experts(routing, hidden_size, out_features, dtype):
    check(operands(routing, hidden_size, out_features, dtype, bias=True))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_narrow_experts_in_views(view):
    call = operands(Routing(150, 4, 2, "dropped"), 24, 20, torch.float32, bias=True)
    call = {name: as_strided_copy(t, view) for name, t in call.items()}
    check(call, grad_view=view)


@pytest.mark.parametrize("wanted", ["x", "w", "bias"])
def test_narrow_experts_one_gradient_at_a_time(wanted):
    check(operands(Routing(150, 4, 2, "dropped"), 9, 12, torch.float32, bias=True), [wanted])


def test_narrow_experts_of_many_tokens():
    """More tokens than 16 chunks of 256, so that a chunk has several blocks."""
    check(operands(Routing(4500, 3, 1, "skewed"), 5, 6, torch.float32, bias=True))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", ["x", "w", "bias", "topk_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, name, view):
    call = operands(SMALL, 11, 14, dtype, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("wanted", ["x", "w", "bias"])
def test_one_gradient_at_a_time(wanted):
    check(operands(SMALL, 9, 12, torch.float32, bias=True), [wanted])


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_slots_are_zero_and_keep_nan_out(dtype, tokens):
    call = operands(Routing(tokens, 3, 2), 8, 10, dtype, bias=True)
    call["topk_ids"][4, 1] = 3
    call["topk_ids"][5] = -1
    call["x"][5] = torch.nan
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    h = moe_ops.moe_linear_map(**call)
    assert bool((h[4, 1] == 0).all()) and bool((h[5] == 0).all())
    assert not h.isnan().any()
    grad = torch.ones_like(h)
    grad[5] = torch.nan
    grads = torch.autograd.grad(h, leaves, grad)
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[0][5] == 0).all())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_gradcheck(bias):
    call = operands(Routing(4, 3, 2, "dropped"), 3, 4, torch.float64, bias=bias)
    names = differentiable(call)
    inputs = tuple(call[name].requires_grad_() for name in names)

    def fn(*tensors):
        return moe_ops.moe_linear_map(**{**call, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(fn, inputs)


def test_double_backward_works_or_says_so():
    """The second derivative is right or refused; a silent zero would be neither."""
    call = operands(SMALL, 3, 4, torch.float64)
    x, w = call["x"].requires_grad_(), call["w"].requires_grad_()
    want = torch.autograd.grad(
        torch.autograd.grad(reference.moe_linear_map(**call).pow(2).sum(), x, create_graph=True)[
            0
        ].sum(),
        w,
    )[0]
    (grad,) = torch.autograd.grad(moe_ops.moe_linear_map(**call).pow(2).sum(), x, create_graph=True)
    try:
        (got,) = torch.autograd.grad(grad.sum(), w)
    except (NotImplementedError, RuntimeError) as error:
        assert "moe_linear_map" in str(error)
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
    torch.library.opcheck(torch.ops.moe_ops.moe_linear_map.default, tuple(call.values()), keyword)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    call = operands(SMALL, 6, 7, dtype, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    compiled = torch.compile(moe_ops.moe_linear_map, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.moe_linear_map(**call)
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
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        h = moe_ops.moe_linear_map(**call)
    assert_identical(h, moe_ops.moe_linear_map(**half))


@pytest.mark.parametrize(("tokens", "out_features"), [(200, 80), (1000, 48), (200, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, tokens, out_features, set_threads):
    call = operands(Routing(tokens, 8, 2, "dropped"), 64, out_features, dtype, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    grad = torch.randn(tokens, 2, out_features).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        h = moe_ops.moe_linear_map(**call)
        runs.append((h, *torch.autograd.grad(h, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6)}, "x", "[6]"),
        ({"x": torch.zeros(6, 5, dtype=torch.int32)}, "x", "int32"),
        ({"w": torch.zeros(7, 5)}, "w", "[7, 5]"),
        ({"w": torch.zeros(4, 7, 6)}, "w", "6"),
        ({"w": torch.zeros(4, 7, 5, dtype=torch.float16)}, "w", "float16"),
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
    with bad_input("moe_linear_map", name, got):
        moe_ops.moe_linear_map(**{**call, **change})
