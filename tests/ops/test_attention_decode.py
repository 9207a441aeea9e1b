from __future__ import annotations

import pytest
import torch
from tests.helpers import attention_block
from tests.helpers.attention_block import mask_of, sorted_call
from tests.helpers.op_case import OpCase
from tests.helpers.quantized import label_of, quantized

import moe_ops
from moe_ops.quant import dequantize_weight
from moe_ops.testing import assert_identical, short

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
KEPT = ("keys", "values")


def small_call(s):
    batch, length, heads, size, start = s.t, s.e, 2 * s.k, 2 * s.o, 3
    end, kv_width = start + length, s.k * size
    return {
        "x": s.float(batch, length, s.h),
        "w_q": s.float(heads * size, s.h),
        "w_k": s.float(kv_width, s.h),
        "w_v": s.float(kv_width, s.h),
        "w_o": s.float(s.h, heads * size),
        "cos": s.float(batch, length, s.o),
        "sin": s.float(batch, length, s.o),
        "keys": s.float(batch, s.k, end + 2, size),
        "values": s.float(batch, s.k, end + 2, size),
        "start": start,
        "rotary_size": size,
        "scale": 0.5,
        "norm_weight": s.float(s.h),
        "b_q": s.float(heads * size),
        "b_o": s.float(s.h),
        "q_norm": s.float(size),
        "k_norm": s.float(size),
        "mask": torch.rand(batch, 1, length, end) < 0.7,
        "sinks": s.float(heads),
    }


OP_CASES = {
    "attention_decode": OpCase(
        small_call,
        free_dims={
            "cos": (0, 2),
            "sin": (0, 2),
            "keys": (2,),
            "values": (2,),
            "mask": (0,),
        },
        bad_arguments={
            "start": (-1, 2**31, 2**40),
            "rotary_size": (-2, 3, 1000),
            "scale": (float("inf"), float("nan")),
            "eps": (-1.0, float("nan")),
            "head_eps": (-1.0, float("nan")),
            "residual_scale": (float("inf"), float("nan")),
        },
        mixed_floats=(),
        kind="quantized",
    )
}


def operands(
    dtype=torch.float32,
    batch=2,
    length=1,
    start=9,
    hidden=40,
    heads=6,
    kv_heads=2,
    size=16,
    rotary_size=None,
    norms="head",
    mask=None,
    bias=False,
    sinks=False,
    **options,
):
    """A call with room for three more tokens; what is not written is NaN."""
    rotary_size = size if rotary_size is None else rotary_size
    end = start + length

    def normal(*shape, mean=0.0):
        return (mean + torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).to(dtype)

    angles = torch.randn(batch, length, max(rotary_size // 2, 1))
    call = {
        "x": normal(batch, length, hidden),
        "w_q": normal(heads * size, hidden),
        "w_k": normal(kv_heads * size, hidden),
        "w_v": normal(kv_heads * size, hidden),
        "w_o": normal(hidden, heads * size),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": torch.full((batch, kv_heads, end + 3, size), torch.nan, dtype=dtype),
        "values": torch.full((batch, kv_heads, end + 3, size), torch.nan, dtype=dtype),
        "start": start,
        "rotary_size": rotary_size,
        "scale": size**-0.5,
        "norm_weight": normal(hidden, mean=1.0),
        **options,
    }
    for name in KEPT:
        call[name][:, :, :start] = normal(batch, kv_heads, start, size)
    if norms is not None:
        widths = (size, size) if norms == "head" else (heads * size, kv_heads * size)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            call[name] = normal(width, mean=1.0)
    if bias:
        for name in "qkvo":
            call[f"b_{name}"] = normal(call[f"w_{name}"].shape[0])
    if sinks:
        call["sinks"] = normal(heads)
    if mask is not None:
        call["mask"] = mask_of(mask, batch, length, end)
    return call


def run(function, call):
    return attention_block.run(function, call, KEPT)


def check(call, exact=None, tolerance=None):
    return attention_block.check("attention_decode", call, KEPT, exact, tolerance)


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norms": None, "norm_weight": None},
        {"norms": "token", "bias": True},
        {"length": 5, "batch": 3},
        {"length": 4, "start": 0, "heads": 2, "kv_heads": 2},
        {"length": 3, "mask": "bool"},
        {"mask": "float", "sinks": True, "bias": True},
        {"rotary_size": 8, "residual_scale": 0.7},
        {"rotary_size": 0, "batch": 1, "start": 70},
        {"size": 20, "hidden": 33, "heads": 5, "kv_heads": 1},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_values(dtype, options):
    check(operands(dtype, **options))


def test_angles_for_all_sequences_and_more_than_are_read():
    call = operands(batch=3, length=2)
    for name in ("cos", "sin"):
        call[name] = torch.cat((call[name][:1], torch.full((1, 2, 5), 7.0)), dim=-1)
    check(call)


def test_a_mask_for_all_sequences():
    call = operands(batch=3, length=2, mask="bool")
    check({**call, "mask": call["mask"][:1]})


def test_one_by_one_or_all_at_once():
    call = operands(length=4, start=3)
    y, keys, values = run(moe_ops.attention_decode, call)
    kept = {name: call[name].clone() for name in KEPT}
    for s in range(4):
        part = {name: call[name][:, s : s + 1] for name in ("x", "cos", "sin")}
        one = moe_ops.attention_decode(**{**call, **kept, **part, "start": 3 + s})
        torch.testing.assert_close(one, y[:, s : s + 1])
    torch.testing.assert_close(tuple(kept.values()), (keys, values), equal_nan=True)


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_query_that_sees_nothing_attends_to_nothing(mask):
    call = operands(length=2, start=0, mask="bool")
    call["mask"] = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    if mask == "float":
        call["mask"] = torch.full((2, 1, 2, 2), -torch.inf)
    y, _, _ = check(call)
    assert_identical(y, call["x"])


@pytest.mark.cpu_only
@dtypes
def test_the_same_bits_for_any_layout_and_number_of_threads(dtype, set_threads):
    """Large enough for a region of several threads."""
    call = operands(dtype, batch=3, length=2, hidden=512, heads=16, kv_heads=4, size=32)
    set_threads(1)
    want = run(moe_ops.attention_decode, call)
    for threads in (2, 4):
        set_threads(threads)
        for ours, theirs in zip(run(moe_ops.attention_decode, call), want, strict=True):
            assert_identical(ours, theirs)
    call["x"] = call["x"].mT.contiguous().mT
    for name in KEPT:  # As a cache by tokens has them.
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in "qkvo":
        w = torch.zeros(call[f"w_{name}"].shape[0], call[f"w_{name}"].shape[1] + 4, dtype=dtype)
        w[:, :-4] = call[f"w_{name}"]
        call[f"w_{name}"] = w[:, :-4]
    for ours, theirs in zip(run(moe_ops.attention_decode, call), want, strict=True):
        assert_identical(ours, theirs)


def test_weights_stored_transposed():
    call = operands(torch.bfloat16, length=2)
    for name in "qkvo":
        call[f"w_{name}"] = call[f"w_{name}"].T.contiguous().T
    check(call)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64)])
def test_codes(bits, group):
    """Codes act as in grouped_gemm_quantized: weights are exact, rows are rounded to integers."""
    call = operands(torch.bfloat16, hidden=128, heads=4, size=32, bias=True, length=2)
    kind, exact = label_of(bits, group), dict(call)
    for name in "qko":  # w_v stays as it is: each is for itself.
        q, scale = quantized(call[f"w_{name}"].float()[None], bits, group)
        call |= {f"w_{name}": q[0], f"w_{name}_scale": scale[0]}
        exact[f"w_{name}"] = dequantize_weight(q, scale, kind)[0]
    check(call | {"formats": [kind, kind, "float", kind]}, exact, 0.03)


def test_no_tokens():
    call = operands(length=0)
    y, keys, _ = run(moe_ops.attention_decode, call)
    assert y.shape == (2, 0, 40)
    assert_identical(keys, call["keys"])


@pytest.mark.cpu_only
def test_sequences_do_not_see_each_other():
    call = operands(torch.bfloat16, batch=3, length=2, hidden=256, heads=8, size=32, mask="bool")
    with moe_ops.batch_invariant():
        y, _, _ = run(moe_ops.attention_decode, call)
        for b in range(3):
            names = ("x", "cos", "sin", "keys", "values", "mask")
            one = {name: call[name][b : b + 1] for name in names}
            assert_identical(run(moe_ops.attention_decode, {**call, **one})[0], y[b : b + 1])


def test_no_gradient():
    call = operands()
    call["w_o"].requires_grad_()
    with pytest.raises(NotImplementedError, match="attention_decode: it has no gradient, and w_o"):
        moe_ops.attention_decode(**call)
    with torch.no_grad():
        moe_ops.attention_decode(**call)


@pytest.mark.cpu_only
def test_opcheck():
    row = sorted_call("attention_decode", operands(mask="bool", bias=True))
    torch.library.opcheck(torch.ops.moe_ops.attention_decode.default, tuple(row))


@pytest.mark.cpu_only
def test_compiled():
    call = operands(mask="bool", sinks=True)
    compiled = torch.compile(moe_ops.attention_decode, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, call), run(moe_ops.attention_decode, call), strict=True):
        assert_identical(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, r"x must be \[B, S, H\]"),
        ({"w_q": torch.zeros(95, 40)}, r"w_q must have a multiple of m d = 32 features"),
        ({"w_k": torch.zeros(32, 39)}, r"w_k must have rows of 40 weights, got 39"),
        ({"w_o": torch.zeros(40, 96).double()}, r"w_o must be float32 like x, got float64"),
        ({"w_v": torch.zeros(32, 40, dtype=torch.int8)}, r"w_v must be float32 like x, got int8"),
        ({"w_v_scale": torch.zeros(32)}, r"w_v_scale must be None for float, got shape"),
        ({"k_norm": None}, r"q_norm and k_norm must be given together"),
        ({"q_norm": torch.zeros(96)}, r"k_norm must have"),
        ({"rotary_size": 18}, r"rotary_size must be even and from 0 to d = 16, got 18"),
        ({"cos": torch.zeros(2, 1, 7)}, r"cos must have at least rotary_size / 2 = 8 angles"),
        ({"start": 12}, r"keys must have room for start \+ S = 14 tokens"),
        ({"keys": torch.zeros(2, 2, 1, 16).expand(2, 2, 13, 16)}, r"keys must have memory of"),
        ({"keys": torch.zeros(2, 2, 16, 13).mT}, r"keys must have features side by side"),
        ({"mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)}, r"mask must have start \+ S = 10"),
        ({"sinks": torch.zeros(5)}, r"sinks must have the number of query heads = 6"),
        ({"eps": -1.0}, r"eps must be at least 0, got -1"),
    ],
)
@pytest.mark.cpu_only
def test_bad_calls(change, message):
    call = operands()
    if "start" in change:
        call["x"] = call["x"].repeat(1, 2, 1)
        call["cos"], call["sin"] = (call[n].repeat(1, 2, 1) for n in ("cos", "sin"))
    with pytest.raises(ValueError, match=f"attention_decode: {message}"):
        moe_ops.attention_decode(**{**call, **change})
