from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import attention_block
from tests.helpers.attention_block import mask_of, sorted_call
from tests.helpers.op_case import OpCase
from tests.helpers.quantized import label_of, quantized

import moe_ops
from moe_ops import reference
from moe_ops.quant import dequantize_weight
from moe_ops.testing import assert_identical, short

OP = "mla_decode"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
KEPT = ("latents", "rope_keys")


def small_call(s):
    batch, length, heads, rank, half, nope, value, start = s.t, s.e, s.k, s.i, s.o, 3, 4, 3
    end, rope = start + length, 2 * half
    return {
        "x": s.float(batch, length, s.h),
        "w_q": s.float(heads * (nope + rope), 7),
        "w_kv_a": s.float(rank + rope, s.h),
        "kv_norm": s.float(rank),
        "w_kv_b": s.float(heads * (nope + value), rank),
        "w_o": s.float(s.h, heads * value),
        "cos": s.float(batch, length, half),
        "sin": s.float(batch, length, half),
        "latents": s.float(batch, 1, end + 2, rank),
        "rope_keys": s.float(batch, 1, end + 2, rope),
        "start": start,
        "num_heads": heads,
        "scale": 0.5,
        "norm_weight": s.float(s.h),
        "w_q_a": s.float(7, s.h),
        "q_norm": s.float(7),
        "b_q_a": s.float(7),
        "b_kv_a": s.float(rank + rope),
        "b_o": s.float(s.h),
        "interleaved": True,
        "mask": torch.rand(batch, 1, length, end) < 0.7,
    }


OP_CASES = {
    OP: OpCase(
        small_call,
        free_dims={
            "cos": (0, 2),
            "sin": (0, 2),
            "latents": (2,),
            "rope_keys": (2,),
            "mask": (0,),
        },
        bad_arguments={
            "start": (-1, 2**31, 2**40),
            "num_heads": (-1, 0, 1000, 2**40),
            "scale": (float("inf"), float("nan")),
            "eps": (-1.0, float("nan")),
            "latent_eps": (-1.0, float("nan")),
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
    heads=3,
    rank=24,
    nope=16,
    rope=8,
    value=12,
    query_rank=20,
    mask=None,
    bias=False,
    **options,
):
    """A call with room for three more tokens; what is not written is NaN."""
    end = start + length

    def normal(*shape, mean=0.0):
        return (mean + torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).to(dtype)

    angles = torch.randn(batch, length, rope // 2)
    call = {
        "x": normal(batch, length, hidden),
        "w_q": normal(heads * (nope + rope), query_rank or hidden),
        "w_kv_a": normal(rank + rope, hidden),
        "kv_norm": normal(rank, mean=1.0),
        "w_kv_b": normal(heads * (nope + value), rank),
        "w_o": normal(hidden, heads * value),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "latents": torch.full((batch, 1, end + 3, rank), torch.nan, dtype=dtype),
        "rope_keys": torch.full((batch, 1, end + 3, rope), torch.nan, dtype=dtype),
        "start": start,
        "num_heads": heads,
        "scale": (nope + rope) ** -0.5,
        "norm_weight": normal(hidden, mean=1.0),
    }
    for name in KEPT:
        call[name][:, :, :start] = normal(batch, 1, start, call[name].shape[3])
    if query_rank:
        call |= {"w_q_a": normal(query_rank, hidden), "q_norm": normal(query_rank, mean=1.0)}
    if bias:
        for name in ("q", "kv_a", "o", *(["q_a"] if query_rank else [])):
            call[f"b_{name}"] = normal(call[f"w_{name}"].shape[0])
    if mask is not None:
        call["mask"] = mask_of(mask, batch, length, end)
    return call | options


def run(function, call):
    return attention_block.run(function, call, KEPT)


def check(call, exact=None, tolerance=None):
    return attention_block.check(OP, call, KEPT, exact, tolerance)


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_rank": None, "norm_weight": None, "bias": True},
        {"interleaved": True, "length": 3, "mask": "bool", "bias": True},
        {"interleaved": True, "interleaved_keys": True, "mask": "float", "residual_scale": 0.7},
        {"interleaved_keys": True, "length": 4, "start": 0, "heads": 1, "value": 1},
        {"q_norm": None, "batch": 1, "start": 70, "latent_eps": 0.1},
        {"hidden": 33, "rank": 7, "nope": 5, "rope": 2, "value": 3, "query_rank": 9, "heads": 5},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_values(dtype, options):
    check(operands(dtype, **options))


def test_keys_and_values_of_heads():
    """The op never makes what is computed here: every head has its own keys and values, as in the
    formula of the paper."""
    call = operands(torch.float64, length=3, interleaved=True)
    y, latents, rope_keys = run(reference.mla_decode, call)
    x = F.rms_norm(call["x"], (40,), call["norm_weight"], 1e-6)
    q = F.rms_norm(x @ call["w_q_a"].T, (20,), call["q_norm"], 1e-6) @ call["w_q"].T
    q = q.unflatten(2, (3, 24)).transpose(1, 2)
    c, s = call["cos"][:, None], call["sin"][:, None]
    a, b = q[..., 16::2], q[..., 17::2]
    q = torch.cat((q[..., :16], a * c - b * s, b * c + a * s), dim=-1)
    kv = (latents[:, 0, :12] @ call["w_kv_b"].T).unflatten(2, (3, 28)).transpose(1, 2)
    k = torch.cat((kv[..., :16], rope_keys[:, :, :12].expand(-1, 3, -1, -1)), dim=-1)
    sees = torch.ones(3, 12, dtype=torch.bool).tril(9)
    mixed = F.scaled_dot_product_attention(q, k, kv[..., 16:], sees, scale=call["scale"])
    want = call["x"] + mixed.transpose(1, 2).flatten(2) @ call["w_o"].T
    torch.testing.assert_close(y, want)


def test_one_by_one_or_all_at_once():
    call = operands(length=4, start=3, interleaved=True)
    y, latents, rope_keys = run(moe_ops.mla_decode, call)
    kept = {name: call[name].clone() for name in KEPT}
    for s in range(4):
        part = {name: call[name][:, s : s + 1] for name in ("x", "cos", "sin")}
        one = moe_ops.mla_decode(**{**call, **kept, **part, "start": 3 + s})
        torch.testing.assert_close(one, y[:, s : s + 1])
    torch.testing.assert_close(tuple(kept.values()), (latents, rope_keys), equal_nan=True)


def test_a_query_that_sees_nothing_attends_to_nothing():
    call = operands(length=2, start=0)
    call["mask"] = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    assert_identical(check(call)[0], call["x"])


@pytest.mark.cpu_only
@dtypes
def test_the_same_bits_for_any_layout_and_number_of_threads(dtype, set_threads):
    """Large enough for a region of several threads."""
    call = operands(dtype, batch=3, length=2, hidden=512, heads=16, rank=128, query_rank=None)
    set_threads(1)
    want = run(moe_ops.mla_decode, call)
    set_threads(3)
    for ours, theirs in zip(run(moe_ops.mla_decode, call), want, strict=True):
        assert_identical(ours, theirs)
    call["x"] = call["x"].mT.contiguous().mT
    for name in KEPT:  # As a cache by tokens has them.
        call[name] = call[name].transpose(0, 2).contiguous().transpose(0, 2)
    for name in ("q", "kv_a", "kv_b", "o"):
        w = call[f"w_{name}"]
        call[f"w_{name}"] = F.pad(w, (0, 4))[:, :-4]
    for ours, theirs in zip(run(moe_ops.mla_decode, call), want, strict=True):
        assert_identical(ours, theirs)


def test_weights_stored_transposed_and_angles_for_all_sequences():
    call = operands(torch.bfloat16, batch=3, length=2)
    for name in ("q", "q_a", "kv_a", "kv_b", "o"):
        call[f"w_{name}"] = call[f"w_{name}"].T.contiguous().T
    for name in ("cos", "sin"):
        call[name] = torch.cat((call[name][:1], torch.full((1, 2, 5), torch.nan)), dim=-1)
    check(call)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_codes(bits, group):
    """Codes act as in grouped_gemm_quantized: weights are exact, rows are rounded to integers."""
    call = operands(torch.bfloat16, hidden=128, query_rank=64, heads=4, value=16, length=2)
    kind, exact = label_of(bits, group), dict(call)
    for name in ("q_a", "q", "o"):  # w_kv_a stays as it is: each is for itself.
        q, scale = quantized(call[f"w_{name}"].float()[None], bits, group)
        call |= {f"w_{name}": q[0], f"w_{name}_scale": scale[0]}
        exact[f"w_{name}"] = dequantize_weight(q, scale, kind)[0]
    check(call | {"formats": [kind, "float", kind, kind]}, exact, 0.03)


def test_no_tokens():
    call = operands(length=0)
    y, latents, _ = run(moe_ops.mla_decode, call)
    assert y.shape == (2, 0, 40)
    assert_identical(latents, call["latents"])


@pytest.mark.cpu_only
def test_sequences_do_not_see_each_other():
    call = operands(torch.bfloat16, batch=3, length=2, hidden=256, heads=8, mask="bool")
    with moe_ops.batch_invariant():
        y, _, _ = run(moe_ops.mla_decode, call)
        for b in range(3):
            one = {name: call[name][b : b + 1] for name in ("x", "cos", "sin", "mask", *KEPT)}
            got = run(moe_ops.mla_decode, {**call, **one})[0]
            assert_identical(got, y[b : b + 1])


def test_no_gradient():
    call = operands()
    call["w_o"].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{OP}: it has no gradient, and w_o"):
        moe_ops.mla_decode(**call)
    with torch.no_grad():
        moe_ops.mla_decode(**call)


@pytest.mark.cpu_only
def test_opcheck():
    row = sorted_call(OP, operands(mask="bool", bias=True))
    torch.library.opcheck(torch.ops.moe_ops.mla_decode.default, tuple(row))


@pytest.mark.cpu_only
def test_compiled():
    call = operands(mask="bool", interleaved=True)
    compiled = torch.compile(moe_ops.mla_decode, fullgraph=True, backend="aot_eager")
    want = run(moe_ops.mla_decode, call)
    for ours, theirs in zip(run(compiled, call), want, strict=True):
        assert_identical(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, r"x must be \[B, S, H\]"),
        ({"w_q": torch.zeros(73, 20)}, r"w_q must have more than 8 features for each of num_heads"),
        ({"w_q": torch.zeros(72, 40)}, r"w_q must have rows of 20 weights, got 40"),
        ({"w_q_a": None}, r"q_norm, b_q_a and w_q_a_scale must be None without w_q_a"),
        ({"q_norm": torch.zeros(21)}, r"q_norm must have the number of features of w_q_a = 20"),
        ({"kv_norm": torch.zeros(23)}, r"kv_norm must have r = 24"),
        ({"w_kv_a": torch.zeros(31, 40)}, r"w_kv_a must have the number of features = 32"),
        ({"w_kv_b": torch.zeros(48, 24)}, r"w_kv_b must have more than 16 features for each of"),
        ({"w_kv_b": torch.zeros(84, 24).double()}, r"w_kv_b must be float32 like x, got float64"),
        ({"w_o": torch.zeros(40, 35)}, r"w_o must have rows of 36 weights, got 35"),
        ({"num_heads": 0}, r"num_heads must be from 1 to 2\^31 - 1, got 0"),
        ({"latents": torch.zeros(2, 2, 13, 24)}, r"latents must have the heads = 1"),
        ({"rope_keys": torch.zeros(2, 1, 13, 7)}, r"rope_keys must have an even number of"),
        ({"rope_keys": torch.zeros(2, 1, 9, 8)}, r"rope_keys must have room for start \+ S = 10"),
        ({"latents": torch.zeros(2, 1, 1, 24).expand(2, 1, 13, 24)}, r"latents must have memory"),
        ({"cos": torch.zeros(2, 1, 3)}, r"cos must have at least rotary_size / 2 = 4 angles"),
        ({"mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)}, r"mask must have start \+ S = 10"),
        ({"latent_eps": -1.0}, r"latent_eps must be at least 0, got -1"),
    ],
)
@pytest.mark.cpu_only
def test_bad_calls(change, message):
    with pytest.raises(ValueError, match=f"{OP}: {message}"):
        moe_ops.mla_decode(**{**operands(), **change})
