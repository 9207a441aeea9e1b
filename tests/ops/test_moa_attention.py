"""moa_attention. The file is long because the op has two kinds of weights, whose bounds are derived
here for every gradient, and an op has one file of tests (test_layout.py).
"""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.isas import has_own_kernels, run_python_at
from tests.helpers.op_case import OpCase, ones

import moe_ops
from moe_ops import _library, reference
from moe_ops.reference._common import acc_dtype
from moe_ops.reference.moa_attention import visible
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    eps,
    poisoned,
    seed_from,
    short,
)

OP_CASES = {
    "moa_attention": OpCase(
        lambda s: {
            "q": s.float(2, s.t, s.k, s.e, s.h),
            "k": s.float(2, s.t, s.e, s.h),
            "v": s.float(2, s.t, s.e, s.h),
            "kind": "stick_breaking",
        },
        free_dims={"q": {1, 2}},
        bad_arguments={
            "kind": ("", "Softmax", "softmax\0"),
            "window": (0, -1, -(2**62)),
            "softcap": (0.0, -2.0, float("nan"), float("inf")),
            "scale": (float("nan"), float("inf")),
            "cu_seqlens": (torch.tensor([0, 1]), torch.tensor([0.0])),
        },
        mixed_floats=(),
        too_many_bytes=lambda: moe_ops.moa_attention(
            ones(2**20, 2**20, 1, 2**20, 1, dtype=torch.float64),
            *[ones(2**20, 2**20, 2**20, 1, dtype=torch.float64)] * 2,
            kind="softmax",
        ),
    )
}
KINDS = ("softmax", "stick_breaking")
NAMES = ("q", "k", "v")
TINY = 2.0**-125


@pytest.fixture(autouse=True)
def between(backend, monkeypatch):
    """CUDA kernels round weights, and gradients of logits, to the type of their operands."""
    monkeypatch.setattr(sys.modules[__name__], "ROUNDS_BETWEEN", backend != "cpu")


ROUNDS_BETWEEN = False


def operands(
    dtype, batch=2, tokens=13, slots=2, heads=3, head_size=16, keys=None, spread=1.0, **options
):
    """A call whose logits are about `spread` apart."""
    keys = tokens if keys is None else keys
    call = {
        "q": (spread * torch.randn(batch, tokens, slots, heads, head_size)).to(dtype),
        "k": torch.randn(batch, keys, heads, head_size).to(dtype),
        "v": torch.randn(batch, keys, heads, head_size).to(dtype),
    }
    return {**call, **options}


def both(result):
    """(out, remainder or None)"""
    return result if isinstance(result, tuple) else (result, None)


def run(fn, call, grad, grad_rest):
    leaves = {name: call[name].detach().requires_grad_() for name in NAMES}
    out, rest = both(fn(**{**call, **leaves}))
    outputs, grads = [out], [grad.to(out.dtype)]
    if rest is not None:
        outputs.append(rest)
        grads.append(grad_rest.to(rest.dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return (
        out.detach(),
        None if rest is None else rest.detach(),
        dict(zip(NAMES, found, strict=True)),
    )


def bounds(call, grad, grad_rest):
    """Rounding that an implementation with fp32 sums (fp64 for fp64) may show, element by element.

    A logit of d products has an error of about eps * sqrt(d) times its terms. It moves the weight
    by that factor; a stick-breaking weight moves with the logits of all keys after it too. Errors
    of weights and of their gradients then go through the sums of the formulas.
    """
    dtype = call["q"].dtype
    q, k, v, do = (t.double() for t in (call["q"], call["k"], call["v"], grad))
    size, step = q.shape[-1], eps(acc_dtype(dtype))
    scale, cap = call.get("scale") or size**-0.5, call.get("softcap")
    seen = visible(
        q.shape[1], k.shape[1], call.get("causal", True), call.get("window"),
        call.get("cu_seqlens"), q.device,
    )  # fmt: skip
    dot, back = "bikhd,bjhd->bkhij", "bkhij,bjhd->bikhd"
    forth = "bkhij,bikhd->bjhd"
    terms = 8 + 4 * size**0.5
    longest = 8 + 4 * max(1, k.shape[1], q.shape[1] * q.shape[2]) ** 0.5
    x = torch.einsum(dot, q, k) * scale
    logit_error = step * terms * torch.einsum(dot, q.abs(), k.abs()) * abs(scale)
    slope = 1.0
    logits = x
    if cap is not None:
        logits = cap * torch.tanh(x / cap)
        slope = 1 - torch.tanh(x / cap) ** 2
        logit_error = logit_error + 8 * step * logits.abs()
    logit_error = (logit_error + 2 * step * logits.abs()).masked_fill(~seen, 0)
    g, g_terms = torch.einsum(dot, do, v), torch.einsum(dot, do.abs(), v.abs())
    if call["kind"] == "softmax":
        w = logits.masked_fill(~seen, torch.finfo(torch.float64).min).softmax(-1)
        w = w.masked_fill(~seen, 0)
        largest = logit_error.amax(-1, keepdim=True) if logit_error.shape[-1] else 0
        relative = logit_error + largest + 16 * step
        rest_bound = None
        total = (w * g_terms).sum(-1, keepdim=True)
        out_rounding = eps(dtype) + step * longest
        dl = w * (g - (w * g).sum(-1, keepdim=True)) * slope
        dl_error = w * (relative + longest * step) * (g_terms + total) + w * out_rounding * total
    else:
        z = logits.sigmoid().masked_fill(~seen, 0)
        log_rest = F.logsigmoid(-logits).masked_fill(~seen, 0)
        left = log_rest.flip(-1).cumsum(-1).flip(-1) - log_rest
        moved = z * logit_error + longest * step * log_rest.abs() + 8 * step
        moved = moved.masked_fill(~seen, 0)
        after = moved.flip(-1).cumsum(-1).flip(-1)
        w = z * left.exp()
        relative = logit_error + after + 16 * step
        rest = log_rest.sum(-1).exp()
        rest_bound = rest * (after[..., 0] if after.shape[-1] else 0) + 16 * step * rest
        gr = grad_rest.double().permute(0, 2, 3, 1)
        t, t_error = w * g, w * (relative + longest * step) * g_terms
        remains = (rest * gr)[..., None]
        remains_error = (rest_bound * gr.abs())[..., None] + step * remains.abs()
        before = t.cumsum(-1) - t + remains
        before_size = t.abs().cumsum(-1) + remains.abs()
        dl = (t * (1 - z) - z * before) * slope
        dl_error = t_error + t.abs() * (logit_error + 8 * step)
        dl_error = dl_error + z * (t_error.cumsum(-1) + remains_error)
        dl_error = dl_error + z * before_size * (logit_error + (8 + longest) * step)
        rest_bound = rest_bound.permute(0, 3, 1, 2)
    if cap is not None:
        dl_error = dl_error + dl.abs() * 16 * step
    # A product is more than its rounding where the slope of tanh cancels.
    dl_error = dl_error + (0 if cap is None else step * 16 * (w * (g_terms + g_terms.amax())))
    w_error, long = w * (relative + longest * step), longest * step
    # The smallest weights are zero, or as large as the smallest that is not.
    w_error, dl_error = w_error + TINY, dl_error + TINY * (g_terms + g_terms.sum(-1, keepdim=True))
    if ROUNDS_BETWEEN and dtype.itemsize == 2:
        tiny = 2.0**-25 if dtype == torch.float16 else TINY
        w_error = w_error + 0.51 * eps(dtype) * w + tiny
        dl_error = dl_error + 0.51 * eps(dtype) * dl.abs() + tiny

    def rounded(bound, value):
        return bound + 0.51 * eps(dtype) * value.abs() + torch.finfo(torch.float32).tiny

    tiny_half = 2.0**-24 if dtype == torch.float16 else 0.0
    values = {
        "out": torch.einsum(back, w, v),
        "q": torch.einsum(back, dl, k) * scale,
        "k": torch.einsum(forth, dl, q) * scale,
        "v": torch.einsum(forth, w, do),
    }
    found = {
        "out": torch.einsum(back, w_error, v.abs()),
        "q": torch.einsum(back, dl_error + long * dl.abs(), k.abs()) * abs(scale),
        "k": torch.einsum(forth, dl_error + long * dl.abs(), q.abs()) * abs(scale),
        "v": torch.einsum(forth, w_error + long * w, do.abs()),
    }
    return {n: rounded(found[n], values[n]) + tiny_half for n in found} | {"rest": rest_bound}


def assert_within(actual, expected, bound, what):
    assert actual.shape == expected.shape, what
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs()
    assert not error.isnan().any(), f"{what}: NaN"
    worst = int((error / bound).argmax())
    ratio = (error / bound).flatten()[worst].item()
    assert ratio <= 1, f"{what}: {ratio:.2f} times the bound, {error.flatten()[worst].item():.3e}"


def check(call, grad_view="contiguous"):
    dtype, shape = call["q"].dtype, call["q"].shape
    grad = as_strided_copy(torch.randn(shape).to(dtype), grad_view)
    grad_rest = torch.randn(shape[:4])
    wide = {n: t.double() if n in NAMES else t for n, t in call.items()}
    expected, rest, grads = run(reference.moa_attention, wide, grad, grad_rest)
    bound = bounds(call, grad, grad_rest)
    with poisoned(call["q"], call["k"]):
        out, rest_ours, grads_ours = run(moe_ops.moa_attention, call, grad, grad_rest)
    assert out.dtype == dtype
    assert_within(out, expected, bound["out"], "out")
    assert (rest is None) == (rest_ours is None)
    if rest is not None:
        assert rest_ours.dtype == acc_dtype(dtype)
        assert_within(rest_ours, rest, bound["rest"] + TINY, "remainder")
    for name in NAMES:
        assert grads_ours[name].dtype == dtype
        assert_within(grads_ours[name], grads[name], bound[name], f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("tokens", "slots", "head_size"),
    [(1, 1, 16), (2, 3, 1), (7, 5, 24), (17, 1, 3), (49, 2, 64), (130, 2, 40), (33, 4, 127)],
)
def test_sizes(tokens, slots, head_size, dtype, kind):
    check(operands(dtype, tokens=tokens, slots=slots, head_size=head_size, kind=kind))


@pytest.mark.parametrize("head_size", [16, 40])
def test_gradient_of_the_log_sum(head_size):
    """The op itself also returns the log-sum-exp of each row, which has gradients too."""
    call = operands(torch.float64, batch=1, tokens=70, heads=2, head_size=head_size)
    arguments = ("softmax", True, head_size**-0.5, 0, 0.0, None)
    leaves = [call[name].requires_grad_() for name in NAMES]
    _, state = torch.ops.moe_ops.moa_attention(*leaves, *arguments)
    logits = torch.einsum("bikhd,bjhd->bikhj", leaves[0], leaves[1]) * head_size**-0.5
    seen = visible(70, 70, True, None, None, logits.device)[:, None, None]
    expected = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(state, expected)
    grad = torch.randn(state.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves[:2], grad)
    found = torch.autograd.grad(state, leaves, grad)
    torch.testing.assert_close(found[:2], wanted)
    assert bool((found[2] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", [128, 193, 200, 256])
def test_wide_heads(head_size, kind):
    check(operands(torch.float32, tokens=70, heads=1, head_size=head_size, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_many_blocks(dtype, kind):
    check(operands(dtype, batch=1, tokens=301, slots=2, heads=1, head_size=32, kind=kind))


HEADS_OF_HALF = {
    "causal": {"tokens": 149},
    "slots": {"tokens": 51, "slots": 5},
    "cache": {"tokens": 60, "keys": 210},
    "window": {"tokens": 150, "window": 70, "scale": 0.3},
    "full": {"tokens": 40, "keys": 333, "causal": False},
    "softcap": {"tokens": 140, "softcap": 2.0},
    "sequences": {"tokens": 140, "cu_seqlens": torch.tensor([0, 70, 71, 140])},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(
            options,
            dtype,
            marks=pytest.mark.slow_on_simulator
            if dtype == torch.float16 and options not in ("causal", "sequences")
            else (),
            id=f"{options}-{short(dtype)}",
        )
        for options in HEADS_OF_HALF
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_heads_of_half_types(options, dtype, head_size, kind):
    """More than a tile of rows and of keys where there are kernels for these sizes."""
    check(
        operands(dtype, batch=1, heads=2, head_size=head_size, kind=kind, **HEADS_OF_HALF[options])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_many_slots(kind):
    check(operands(torch.float32, batch=1, tokens=5, slots=100, heads=2, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 65), (1, 300), (3, 129), (50, 128)])
def test_cache(tokens, keys, dtype, kind):
    check(operands(dtype, tokens=tokens, keys=keys, kind=kind))


OPTIONS = {
    "full": {"causal": False},
    "window": {"window": 5},
    "wide_window": {"window": 100},
    "full_window": {"causal": False, "window": 9},
    "softcap": {"softcap": 2.0},
    "loose_softcap": {"softcap": 300.0},
    "scale": {"scale": 0.7},
    "negative_scale": {"scale": -0.3},
    "all": {"window": 40, "softcap": 1.5, "scale": 0.2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, dtype, kind):
    check(operands(dtype, tokens=90, heads=2, kind=kind, **OPTIONS[options]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["full", "window", "full_window", "all"])
def test_options_with_a_cache(options, kind):
    check(operands(torch.float32, tokens=70, keys=200, heads=1, kind=kind, **OPTIONS[options]))


# Up to 16 features softmax has kernels of its own, which take 8 keys and a vector of rows at once.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    "head_size",
    [3, 16, *(pytest.param(n, marks=pytest.mark.slow_on_simulator) for n in (8, 12, 17))],
)
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 37, "slots": 3},
        {"tokens": 75, "keys": 78, "slots": 1, "window": 3},
        {"tokens": 60, "keys": 203, "window": 71},
        {"tokens": 21, "keys": 135, "causal": False},
        {"tokens": 70, "keys": 3, "causal": False},
        {"tokens": 99, "cu_seqlens": torch.tensor([0, 0, 5, 69, 69, 99]), "causal": False},
        {"tokens": 5, "keys": 0, "causal": False},
    ],
    ids=["slots", "window", "cache", "full", "few", "sequences", "none"],
)
def test_narrow_heads(options, head_size, dtype):
    batch = 1 if "cu_seqlens" in options else 2
    check(operands(dtype, batch, heads=2, head_size=head_size, kind="softmax", **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("sign", [1, -1], ids=["growing", "falling"])
def test_narrow_heads_whose_logits_grow(dtype, sign):
    """From -120 to 120 along the keys: sums are scaled down again and again, or begin high."""
    call = operands(dtype, tokens=150, heads=1, spread=0.3, kind="softmax", causal=False)
    call["q"][..., 0] = call["q"][..., 0].abs() + 1.0
    call["k"][..., 0] = sign * torch.linspace(-240.0, 240.0, 150)[:, None].to(dtype)
    check(call)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_an_infinite_logit_stays_in_its_row(causal):
    call = operands(torch.float32, batch=1, tokens=50, heads=1, kind="softmax", causal=causal)
    call["k"][..., 0] = call["k"][..., 0].abs() + 0.5
    clean, _ = both(moe_ops.moa_attention(**call))
    call["q"][0, 20, 1, 0, 0] = torch.inf
    out, _ = both(moe_ops.moa_attention(**call))
    assert bool(out[0, 20, 1].isnan().all())
    keep = torch.ones(50, 2, dtype=torch.bool)
    keep[20, 1] = False
    assert_identical(out[0][keep], clean[0][keep])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_keys_than_queries(kind):
    check(operands(torch.float32, tokens=40, keys=7, kind=kind, causal=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "index",
    [torch.int32, pytest.param(torch.int64, marks=pytest.mark.slow_on_simulator)],
    ids=short,
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths", [(90,), (1, 1, 1), (0, 5, 0, 64, 30, 0), (100, 3, 97), (2,) * 40], ids=str
)
def test_sequences(lengths, causal, index, kind):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(index)
    call = operands(torch.float32, batch=1, tokens=sum(lengths), kind=kind, causal=causal)
    check({**call, "cu_seqlens": cu})


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_equal_calls_of_their_own(kind):
    lengths = (70, 1, 33)
    call = operands(torch.float64, batch=1, tokens=sum(lengths), kind=kind)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    out, _ = both(moe_ops.moa_attention(**call, cu_seqlens=cu))
    parts = zip(*(call[name].split(lengths, 1) for name in NAMES), strict=True)
    own = [both(moe_ops.moa_attention(q, k, v, kind=kind))[0] for q, k, v in parts]
    torch.testing.assert_close(out, torch.cat(own, 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.01, 8.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_spread_of_logits(dtype, spread, kind):
    """From sticks that hardly break to sticks that are gone after a key."""
    check(operands(dtype, batch=1, tokens=140, heads=1, spread=spread, kind=kind))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_sticks_that_last(dtype):
    """Logits far below zero: hundreds of tiny shares, whose sum is not lost against one."""
    call = operands(dtype, tokens=200, heads=1, kind="stick_breaking")
    call["q"] = call["q"].abs()
    call["k"] = -4 * call["k"].abs()
    check(call)


@pytest.mark.parametrize(
    ("dtype", "head_size", "tokens", "keys"),
    [
        (torch.float64, 24, 101, 1090),
        (torch.float32, 24, 101, 1090),
        (torch.bfloat16, 24, 140, 2150),
        (torch.bfloat16, 64, 140, 2150),
        pytest.param(torch.float16, 64, 140, 2150, marks=pytest.mark.slow_on_simulator),
    ],
)
def test_sticks_over_many_keys(dtype, head_size, tokens, keys):
    """Rows of several tiles whose sticks reach over more than 32 tiles of keys: CUDA kernels then
    take the rows of a backward in bands."""
    call = operands(
        dtype, 1, tokens, slots=1, heads=1, head_size=head_size, keys=keys, kind="stick_breaking"
    )
    # The mean of |x||y| is 2 / pi: logits of about -8, so that half of a stick is left at the end.
    call["q"] = call["q"].abs()
    call["k"] = -8 * math.pi / 2 * head_size**-0.5 * call["k"].abs()
    check(call)


def loop(q, k, v):
    """The definition of stick-breaking, key by key, for one head: q [S, d], k and v [S, d]."""
    out, remainder = torch.zeros_like(q), []
    for i in range(len(q)):
        left = 1.0
        for j in range(i, -1, -1):
            z = torch.sigmoid(q[i] @ k[j] / q.shape[1] ** 0.5)
            out[i] += left * z * v[j]
            left = left * (1 - z)
        remainder.append(left)
    return out, torch.stack(remainder)


def test_stick_breaking_equals_the_loop_of_its_definition():
    call = operands(torch.float64, batch=1, tokens=70, slots=2, heads=2, kind="stick_breaking")
    for fn in (moe_ops.moa_attention, reference.moa_attention):
        out, rest = fn(**call)
        for slot in range(2):
            for head in range(2):
                want, want_rest = loop(
                    call["q"][0, :, slot, head], call["k"][0, :, head], call["v"][0, :, head]
                )
                torch.testing.assert_close(out[0, :, slot, head], want, rtol=1e-12, atol=1e-14)
                torch.testing.assert_close(
                    rest[0, :, slot, head], want_rest, rtol=1e-11, atol=1e-200
                )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_weights_and_remainder_sum_to_one(dtype):
    call = operands(dtype, tokens=100, kind="stick_breaking")
    call["v"] = torch.ones_like(call["v"])
    out, rest = moe_ops.moa_attention(**call)
    torch.testing.assert_close(
        out, (1 - rest)[..., None].expand_as(out), rtol=64 * eps(dtype), atol=64 * eps(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_one_slot_is_plain_attention(dtype):
    call = operands(dtype, slots=1, tokens=90, kind="softmax")
    q, k, v = call["q"][:, :, 0], call["k"], call["v"]
    plain = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    out = moe_ops.moa_attention(**call)[:, :, 0]
    torch.testing.assert_close(out, plain, rtol=100 * eps(dtype), atol=10 * eps(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 3.0}], ids=str)
def test_decoding_equals_the_whole(options, kind):
    call = operands(torch.float64, tokens=80, kind=kind, **options)
    whole, _ = both(moe_ops.moa_attention(**call))
    for start, end in ((0, 1), (1, 30), (30, 79), (79, 80)):
        step = {**call, "q": call["q"][:, start:end]}
        step["k"], step["v"] = call["k"][:, :end], call["v"][:, :end]
        part, _ = both(moe_ops.moa_attention(**step))
        torch.testing.assert_close(part, whole[:, start:end], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_without_keys_gets_zeros(kind):
    call = operands(torch.float32, tokens=4, keys=0, kind=kind, causal=False)
    out, rest = both(moe_ops.moa_attention(**call))
    assert bool((out == 0).all())
    assert rest is None or bool((rest == 1).all())
    check(call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"tokens": 0}, {"slots": 0}, {"heads": 0}], ids=str
)
def test_empty(sizes, kind):
    call = operands(torch.float32, **{"tokens": 5, **sizes}, keys=5, kind=kind)
    leaves = [call[name].requires_grad_() for name in NAMES]
    out, _ = both(moe_ops.moa_attention(**call))
    assert out.shape == call["q"].shape
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape and bool((grad == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, name, view, kind):
    call = operands(dtype, tokens=21, kind=kind)
    call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_kept_before_tokens(kind):
    """Operands as torch's attention has them, [B, n, S, d] in memory."""
    call = operands(torch.float32, tokens=40, kind=kind)
    for name in ("k", "v"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(call)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind):
    call = operands(torch.float32, batch=1, tokens=80, heads=1, kind=kind)
    clean, _ = both(moe_ops.moa_attention(**call))
    call["q"][0, 40, 1] = torch.nan
    out, _ = both(moe_ops.moa_attention(**call))
    assert bool(out[0, 40, 1].isnan().all())
    keep = torch.ones(80, 2, dtype=torch.bool)
    keep[40, 1] = False
    assert_identical(out[0][keep], clean[0][keep])


# What a query does not see reaches neither its result nor its gradients, whatever it is.
MASKS = {
    "causal": {"tokens": 75},
    "window": {"tokens": 131, "window": 20, "slots": 1},
    "full_window": {"tokens": 75, "window": 9, "causal": False},
    "cache": {"tokens": 20, "keys": 150},
    "sequences": {"tokens": 75, "causal": False, "cu_seqlens": torch.tensor([0, 20, 21, 60, 75])},
    "all": {"tokens": 131, "slots": 1, "window": 12, "cu_seqlens": torch.tensor([0, 64, 131])},
    "softcap": {"tokens": 75, "window": 30, "softcap": 2.0},
}
NOT_FINITE = (math.nan, math.inf, -math.inf)


def spread_of(what, seen):
    """Queries and keys that numbers of some keys, or of some queries, may reach.

    A query that sees such a key has no finite gradient any more, which goes to all keys it sees.
    """
    keys, tokens = what.get("keys"), what.get("tokens")
    reached = seen[:, keys].any(1) if keys is not None else torch.zeros(len(seen), dtype=torch.bool)
    if tokens is not None:
        reached[tokens] = True
    return reached, seen[reached].any(0)


def with_numbers(call, grad, where, tokens, keys, value, features):
    """Returns the same call and gradient, with `value` in some rows of one operand."""
    changed, grad = {n: t.clone() if n in NAMES else t for n, t in call.items()}, grad.clone()
    row = {"q": (changed["q"], tokens), "grad": (grad, tokens)}.get(where)
    tensor, rows = row or (changed[where], keys)
    tensor[:, rows, ..., features] = value
    return changed, grad


def check_unseen(call, places=("k", "v", "q", "grad"), values=NOT_FINITE):
    shape, size = call["q"].shape, call["q"].shape[-1]
    grad, grad_rest = torch.randn(shape).to(call["q"].dtype), torch.randn(shape[:4])
    seen = visible(
        shape[1], call["k"].shape[1], call.get("causal", True), call.get("window"),
        call.get("cu_seqlens"), call["q"].device,
    )  # fmt: skip
    clean = run(moe_ops.moa_attention, call, grad, grad_rest)
    for where in places:
        for value in values:
            tokens, keys = (torch.randperm(n)[:2] for n in seen.shape)
            features = slice(None) if value != value else slice(size // 2, size // 2 + 1)
            changed, changed_grad = with_numbers(call, grad, where, tokens, keys, value, features)
            out, rest, grads = run(moe_ops.moa_attention, changed, changed_grad, grad_rest)
            what = {"keys": keys} if where in "kv" else {"tokens": tokens}
            queries, reached = (~t for t in spread_of(what, seen))
            label = f"{where} {value} in tokens {tokens.tolist()}, keys {keys.tolist()}"
            assert_identical(out[:, queries], clean[0][:, queries], f"out, {label}")
            if rest is not None:
                assert_identical(rest[:, queries], clean[1][:, queries], f"remainder, {label}")
            for name in NAMES:
                mine = queries if name == "q" else reached
                assert_identical(
                    grads[name][:, mine], clean[2][name][:, mine], f"gradient of {name}, {label}"
                )


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("head_size", [7, 16, 40])
@pytest.mark.parametrize("mask", MASKS)
def test_unseen_numbers(mask, head_size, dtype, kind):
    options = {"batch": 1, "heads": 2, "head_size": head_size, **MASKS[mask]}
    check_unseen(operands(dtype, kind=kind, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 150, "slots": 1, "head_size": 64},
        {"tokens": 70, "head_size": 130, "window": 9},
        {"tokens": 5, "keys": 70, "head_size": 24, "window": 40},
        {"tokens": 140, "slots": 1, "head_size": 128, "cu_seqlens": torch.tensor([0, 70, 71, 140])},
    ],
    ids=["causal", "window", "cache", "sequences"],
)
def test_unseen_nan(options, dtype, kind):
    """A case a kernel, for the simulator too."""
    check_unseen(operands(dtype, batch=1, heads=1, kind=kind, **options), values=(math.nan,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["k", "v", "q", "grad"])
def test_numbers_that_are_seen_go_where_the_reference_says(place, kind):
    call = operands(torch.float32, batch=1, tokens=90, heads=1, kind=kind, window=35)
    grad, grad_rest = torch.randn(call["q"].shape), torch.randn(call["q"].shape[:4])
    rows = torch.tensor([41])
    for value in NOT_FINITE if place == "v" else (math.nan,):
        changed, changed_grad = with_numbers(call, grad, place, rows, rows, value, slice(3, 5))
        wide = {n: t.double() if n in NAMES else t for n, t in changed.items()}
        want, rest, grads = run(reference.moa_attention, wide, changed_grad, grad_rest)
        got, rest_ours, grads_ours = run(moe_ops.moa_attention, changed, changed_grad, grad_rest)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert rest is None or torch.equal(rest_ours.isnan(), rest.isnan())
        for name in NAMES:
            assert torch.equal(grads_ours[name].isfinite(), grads[name].isfinite()), name


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_does_not_see_them_either(mask, kind, monkeypatch):
    monkeypatch.setattr(moe_ops, "moa_attention", reference.moa_attention)
    options = {"batch": 1, "heads": 1, "head_size": 3, **MASKS[mask]}
    check_unseen(operands(torch.float64, kind=kind, **options), values=(math.nan,))


INVARIANT = {
    "causal": {},
    "window": {"window": 70},
    "softcap": {"softcap": 2.0},
    "sequences": {"cu_seqlens": torch.tensor([0, 0, 130, 131, 200, 513])},
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("head_size", [7, 16, 40, 130])
@pytest.mark.parametrize("options", INVARIANT)
def test_batch_invariance(options, head_size, dtype, kind, set_threads):
    """A token has bitwise identical results in a prefill, in one in steps, in a sequence of its own
    and alone against its cache, in the batch-invariant mode."""
    options = INVARIANT[options]
    bounds = options.get("cu_seqlens", torch.tensor([0, 513])).tolist()
    steps = (  # of queries, and where they end
        *((1, last) for last in (1, 64, 65, 130, 313)),
        *((7, last) for last in (66, 96, 313)),
        *((64, last) for last in (69, 512)),
        (513, 513),
    )
    for slots in (1, 2, 5):
        call = operands(dtype, 1, 513, slots, 1, head_size, kind=kind, **options)
        with moe_ops.batch_invariant():
            set_threads(3)
            whole = both(moe_ops.moa_attention(**call))
            set_threads(1)
            for begin, end in itertools.pairwise(bounds):
                own = {n: t[:, begin:end] for n, t in call.items() if n in NAMES}
                own |= {n: t for n, t in call.items() if n not in (*NAMES, "cu_seqlens")}
                for count, last in steps:
                    if last > end - begin:
                        continue
                    step = {**own, "q": own["q"][:, last - count : last]}
                    step |= {n: own[n][:, :last] for n in "kv"}
                    for got, want in zip(both(moe_ops.moa_attention(**step)), whole, strict=True):
                        if got is not None:
                            want = want[:, begin + last - count : begin + last]
                            assert_identical(got, want, f"{slots} slots, {count} before {last}")


def run_all(every):
    """Numbers that are not seen and batches of other sizes, in a process of its own, at the level
    of instructions that it was started with; without `every`, types for which that level has
    kernels of its own."""
    for kind, dtype, head_size in itertools.product(KINDS, DTYPES, (16, 40)):
        if not every and not has_own_kernels(_library.cpu_isa(), dtype):
            continue
        torch.manual_seed(seed_from(f"{kind} {dtype} {head_size}"))
        for mask in ("all", "window"):
            test_unseen_numbers(mask, head_size, dtype, kind)
        for options in ("window", "sequences"):
            test_batch_invariance(options, head_size, dtype, kind, torch.set_num_threads)


@pytest.mark.cpu_only
@pytest.mark.parametrize("isa", _library.supported_isas()[:-1])
def test_other_instruction_sets(isa, request):
    every = request.config.getoption("--full")
    code = f"from tests.ops.test_moa_attention import run_all; run_all({every})"
    done = run_python_at(isa, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"window": 3, "softcap": 1.3}, {"causal": False, "scale": 0.9}], ids=str
)
def test_gradcheck(options, kind):
    call = operands(torch.float64, batch=1, tokens=6, heads=2, head_size=3, kind=kind, **options)
    inputs = tuple(call[name].requires_grad_() for name in NAMES)

    def fn(q, k, v):
        return moe_ops.moa_attention(**{**call, "q": q, "k": k, "v": v})

    assert torch.autograd.gradcheck(fn, inputs)


def test_the_log_sum_exp_has_a_gradient_too():
    q, k, v = (operands(torch.float64, tokens=5, head_size=3, kind="")[n] for n in NAMES)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))

    def fn(q, k, v):
        return torch.ops.moe_ops.moa_attention(q, k, v, "softmax", True, 0.5, 0, 0.0, None)

    assert torch.autograd.gradcheck(fn, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_says_so(kind):
    call = operands(torch.float64, kind=kind)
    q = call["q"].requires_grad_()
    out, _ = both(moe_ops.moa_attention(**call))
    (grad,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"moa_attention: the second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, kind):
    call = operands(dtype, batch=1, kind=kind)
    q, k, v = (call[name].requires_grad_(requires_grad) for name in NAMES)
    cu = torch.tensor([0, 5, 13], dtype=torch.int32)
    for arguments in ((True, 0.3, 0, 0.0, None), (False, 0.3, 4, 2.0, cu)):
        torch.library.opcheck(torch.ops.moe_ops.moa_attention.default, (q, k, v, kind, *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    call = operands(torch.float32, kind=kind)
    leaves = [call[name].requires_grad_() for name in NAMES]
    compiled = torch.compile(moe_ops.moa_attention, fullgraph=True, backend="aot_eager")
    got, want = both(compiled(**call))[0], both(moe_ops.moa_attention(**call))[0]
    assert_identical(got, want)
    grad = torch.randn(want.shape)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_like_a_linear(kind):
    call = operands(torch.float32, kind=kind)
    half = {n: t.bfloat16() if n in NAMES else t for n, t in call.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out, rest = both(moe_ops.moa_attention(**call))
    want, want_rest = both(moe_ops.moa_attention(**half))
    assert_identical(out, want)
    assert rest is None or torch.equal(rest, want_rest)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_numbers_stay_on_for_others(kind, set_threads):
    """The kernels turn them off while they run."""
    set_threads(1)
    call = {name: t.requires_grad_() for name, t in operands(torch.float32).items()}
    out, _ = both(moe_ops.moa_attention(**call, kind=kind))
    small = torch.full((64,), 2.0**-126)
    assert (small * 0.5 != 0).all()
    out.sum().backward()
    assert (small * 0.5 != 0).all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, kind, set_threads):
    call = operands(dtype, batch=1, tokens=400, heads=3, head_size=24, kind=kind)
    leaves = [call[name].requires_grad_() for name in NAMES]
    grad = torch.randn(call["q"].shape).to(dtype)
    runs = []
    for threads in (1, 2, 3):
        set_threads(threads)
        out, _ = both(moe_ops.moa_attention(**call))
        runs.append((out, *torch.autograd.grad(out, leaves, grad)))
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            assert_identical(a, b)


# A device op cannot look at them.
READS_VALUES = pytest.mark.cpu_only
GOOD = {"batch": 1, "tokens": 6, "slots": 2, "heads": 3, "head_size": 4}


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"q": torch.zeros(1, 6, 3, 4)}, "q", "[1, 6, 3, 4]"),
        ({"q": torch.zeros(1, 6, 2, 3, 4, dtype=torch.int32)}, "q", "int32"),
        ({"q": torch.zeros(1, 6, 2, 3, 5)}, "k", "[1, 6, 3, 4]"),
        ({"k": torch.zeros(1, 6, 4)}, "k", "[1, 6, 4]"),
        ({"k": torch.zeros(2, 6, 3, 4)}, "k", "[2, 6, 3, 4]"),
        ({"k": torch.zeros(1, 6, 2, 4)}, "k", "[1, 6, 2, 4]"),
        ({"k": torch.zeros(1, 6, 3, 4, dtype=torch.float16)}, "k", "float16"),
        ({"v": torch.zeros(1, 7, 3, 4)}, "v", "[1, 7, 3, 4]"),
        ({"v": torch.zeros(1, 6, 3, 4, dtype=torch.bfloat16)}, "v", "bfloat16"),
        ({"kind": "sigmoid"}, "kind", "sigmoid"),
        ({"scale": math.inf}, "scale", "inf"),
        ({"window": 0}, "window", "0"),
        ({"window": -3}, "window", "-3"),
        ({"softcap": 0.0}, "softcap", "0.0"),
        ({"softcap": math.inf}, "softcap", "inf"),
        ({"softcap": math.nan}, "softcap", "nan"),
        ({n: torch.zeros(1, 5, 3, 4) for n in "kv"}, "k", "[1, 5, 3, 4]"),
        ({"cu_seqlens": torch.tensor([0, 6.0])}, "cu_seqlens", "float32"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens", "[1, 2]"),
        pytest.param({"cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens", "1", marks=READS_VALUES),
        pytest.param({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens", "5", marks=READS_VALUES),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens", "4 then 3", marks=READS_VALUES
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, name, got, bad_input):
    call = operands(torch.float32, **GOOD, kind="softmax")
    with bad_input("moa_attention", name, got):
        moe_ops.moa_attention(**{**call, **change})


def test_wide_heads_are_refused(bad_input):
    with bad_input("moa_attention", "q", "257"):
        moe_ops.moa_attention(**operands(torch.float32, head_size=257, kind="softmax"))


def test_sequences_need_one_batch(bad_input):
    call = operands(torch.float32, batch=2, tokens=6, kind="softmax")
    with bad_input("moa_attention", "q", "[2, 6"):
        moe_ops.moa_attention(**call, cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_length_and_not_with_its_square(kind):
    """The largest tensor that autograd keeps, and the workspace, are rows of d numbers."""
    call = operands(torch.float32, batch=1, tokens=700, heads=1, head_size=16, kind=kind)
    leaves = [call[name].requires_grad_() for name in NAMES]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, _ = both(moe_ops.moa_attention(**call))
    assert max(t.numel() for t in saved) <= call["q"].numel()
    torch.autograd.grad(out.sum(), leaves)
