from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import activation_magnitude
from tests.helpers.op_case import OpCase, map_of

import moe_ops
from moe_ops import reference
from moe_ops.ops.all_experts_ffn import DENSE_ACTIVATIONS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "all_experts_ffn": OpCase(
        lambda s: {
            "x": s.float(s.t, s.k, s.h),
            "w_up": s.float(s.e, s.i, s.h),
            "w_down": s.float(s.e, s.o, s.i),
            "input_ids": torch.randint(s.k, (s.e,)),
            "b_up": s.float(s.e, s.i),
            "b_down": s.float(s.e, s.o),
            "activation": "silu",
        },
        free_dims={"x": {0, 1}},
        bad_arguments={"activation": ("", "swiglu", "ReLU", "relu\0")},
        mixed_floats=(),
        too_many_bytes=lambda: moe_ops.all_experts_ffn(
            torch.empty(2**20, 1, 0), torch.empty(1, 0, 0), torch.empty(1, 2**42, 0), map_of(1)
        ),
    )
}
# (H, I, O)
SIZES = (
    (1, 1, 1),
    (3, 7, 5),
    (8, 16, 32),
    (17, 31, 9),
    (33, 5, 65),
    (129, 3, 2),
    (2, 130, 129),
    (193, 9, 4),
    (5, 200, 3),
    (4, 6, 260),
)
FLOATS = ("x", "w_up", "w_down", "b_up", "b_down")


def operands(num_tokens, inputs, input_ids, sizes, dtype, *, bias=True):
    h, i, o = sizes
    e = len(input_ids)
    call = {
        "x": torch.randn(num_tokens, inputs, h).to(dtype),
        "w_up": (torch.randn(e, i, h) / max(h, 1) ** 0.5).to(dtype),
        "w_down": (torch.randn(e, o, i) / max(i, 1) ** 0.5).to(dtype),
        "input_ids": torch.tensor(input_ids),
    }
    if bias:
        call["b_up"] = torch.randn(e, i).to(dtype)
        call["b_down"] = torch.randn(e, o).to(dtype)
    return call


def magnitude(x, w_up, w_down, input_ids, *, b_up=None, b_down=None, activation="relu"):
    h = torch.einsum("teh,eih->tei", x[:, input_ids.long()], w_up)
    h = h if b_up is None else h + b_up
    h = h if activation == "none" else activation_magnitude(h, activation)
    y = torch.einsum("tei,eoi->teo", h, w_down)
    return y if b_down is None else y + b_down


ROUNDINGS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def products_of_torch(backend, monkeypatch):
    """On CUDA, half types round the pre-activation and the activation, and in backward the
    gradients of the two."""
    if backend != "cpu":
        monkeypatch.setitem(globals(), "ROUNDINGS", {"steps": 2, "grad_steps": 4})


def check(call, wrt=None, **kwargs):
    wrt = [name for name in FLOATS if name in call] if wrt is None else wrt
    sizes = (*call["x"].shape, *call["w_up"].shape, call["w_down"].shape[1])
    check_against_reference(
        moe_ops.all_experts_ffn,
        reference.all_experts_ffn,
        call,
        wrt,
        magnitude=magnitude,
        sum_length=max(1, *sizes),
        **ROUNDINGS,
        **kwargs,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, dtype, bias):
    check(operands(11, 2, [1, 0, 1], sizes, dtype, bias=bias))


@pytest.mark.parametrize("activation", DENSE_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_activations(dtype, activation):
    check({**operands(13, 1, [0, 0], (9, 11, 6), dtype), "activation": activation})


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 143, 144, 145, 577, 1300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
def test_tokens(dtype, num_tokens):
    """Blocks of tokens, and the parts that sum weight gradients by themselves."""
    check(operands(num_tokens, 2, [0, 1, 1], (10, 7, 5), dtype))


@pytest.mark.parametrize(
    ("inputs", "input_ids"),
    [(1, [0]), (1, [0] * 5), (4, [3, 2, 1, 0]), (3, [2, 0, 2, 0, 2]), (5, [1, 1, 3])],
    ids=str,
)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=short)
def test_inputs(ids_dtype, inputs, input_ids):
    """Any order, and inputs that no expert reads, whose gradient is zero."""
    call = operands(150, inputs, input_ids, (9, 8, 7), torch.float32)
    call["input_ids"] = call["input_ids"].to(ids_dtype)
    check(call)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_empty_sizes(dtype, sizes):
    check(operands(5, 2, [0, 1], sizes, dtype))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", [*FLOATS, "input_ids"])
def test_views(name, view):
    call = operands(12, 2, [1, 0, 1], (11, 14, 6), torch.float32)
    call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("wanted", FLOATS)
def test_one_gradient_at_a_time(wanted, activation):
    call = operands(150, 2, [1, 0, 1], (9, 12, 5), torch.float32)
    check({**call, "activation": activation}, [wanted])


@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_gradcheck(activation):
    call = operands(4, 2, [1, 0, 1], (3, 4, 2), torch.float64)
    leaves = [call[name].requires_grad_() for name in FLOATS]

    def function(*tensors):
        named = dict(zip(FLOATS, tensors, strict=True))
        return moe_ops.all_experts_ffn(input_ids=call["input_ids"], activation=activation, **named)

    assert torch.autograd.gradcheck(function, leaves)


def test_double_backward_says_so():
    call = operands(4, 1, [0], (3, 4, 2), torch.float64)
    call["x"].requires_grad_()
    y = moe_ops.all_experts_ffn(**call)
    (grad,) = torch.autograd.grad(y.sum(), call["x"], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="all_experts_ffn"):
        torch.autograd.grad(grad.sum(), call["x"])


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad):
    call = operands(5, 2, [1, 0, 1], (3, 4, 2), torch.float32)
    for name in FLOATS:
        call[name].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.all_experts_ffn.default, tuple(call.values()))
    torch.library.opcheck(torch.ops.moe_ops.all_experts_ffn_fwd.default, tuple(call.values()))


def test_compile():
    call = operands(7, 2, [1, 0, 1], (6, 5, 4), torch.float32)
    leaves = [call[name].requires_grad_() for name in FLOATS]
    compiled = torch.compile(moe_ops.all_experts_ffn, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.all_experts_ffn(**call)
    assert_identical(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        assert_identical(a, b)


def test_autocast_computes_in_its_type():
    call = operands(5, 2, [1, 0, 1], (6, 5, 4), torch.float32)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    want = moe_ops.all_experts_ffn(**half)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_identical(moe_ops.all_experts_ffn(**call), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(1400, 2, [1, 0, 1], (33, 20, 17), dtype)
    leaves = [call[name].requires_grad_() for name in FLOATS]
    grad = torch.randn(1400, 3, 17).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y = moe_ops.all_experts_ffn(**call)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert_identical(got, want)


def test_nan_stays_with_its_token():
    call = operands(300, 2, [1, 0, 1], (6, 5, 4), torch.float32)
    call["x"][200, 1] = torch.nan
    nan = moe_ops.all_experts_ffn(**call).isnan()
    assert nan[200, [0, 2]].all() and int(nan.sum()) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 3)}, ["x must be [T, G, H]", "[4, 3]"]),
        ({"x": torch.zeros(4, 2, 3, dtype=torch.int32)}, ["x must be", "int32"]),
        ({"w_up": torch.zeros(3, 5, 4)}, ["w_up must have H = 3", "[3, 5, 4]"]),
        ({"w_up": torch.zeros(0, 5, 3)}, ["at least 1"]),
        ({"w_down": torch.zeros(2, 4, 5)}, ["w_down must have E = 3", "[2, 4, 5]"]),
        ({"w_down": torch.zeros(3, 4, 6)}, ["w_down must have I = 5", "[3, 4, 6]"]),
        ({"w_down": torch.zeros(3, 4, 5).double()}, ["w_down must be float32", "float64"]),
        ({"input_ids": torch.zeros(2, dtype=torch.int32)}, ["input_ids must have E = 3", "[2]"]),
        ({"input_ids": torch.zeros(3)}, ["input_ids must be int32 or int64", "float32"]),
        ({"b_up": torch.zeros(3, 4)}, ["b_up must have", "= 5", "[3, 4]"]),
        ({"b_down": torch.zeros(2, 4)}, ["b_down must have E = 3", "[2, 4]"]),
        ({"activation": "swiglu"}, ["activation must be one of none", "'swiglu'"]),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_calls(change, words):
    call = {**operands(4, 2, [1, 0, 1], (3, 5, 4), torch.float32), **change}
    for device in ("cpu", "meta"):
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        with pytest.raises((ValueError, RuntimeError)) as error:
            moe_ops.all_experts_ffn(**moved)
        for word in ("all_experts_ffn", *words):
            assert word in str(error.value)


@pytest.mark.cpu_only
@pytest.mark.parametrize("wrong", [-1, 2, 2**31 - 1])
def test_an_input_that_does_not_exist(wrong):
    call = operands(4, 2, [1, wrong, 1], (3, 5, 4), torch.float32)
    with pytest.raises(ValueError, match=rf"input_ids must hold values from 0 to 1, got {wrong}"):
        moe_ops.all_experts_ffn(**call)
