"""The formulas of decoding steps beside the reference, and what a query of theirs depends on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.helpers.attention_block import run
from tests.helpers.nearness import check
from tests.helpers.quantized import label_of, quantized
from tests.ops import test_attention_decode as heads
from tests.ops import test_mla_decode as latent

from moe_ops import reference
from moe_ops.formulas.attention_block import attend
from moe_ops.formulas.attention_decode import attention_decode
from moe_ops.formulas.mla_decode import mla_decode
from moe_ops.testing import as_strided_copy, assert_identical, short

FORMULAS = {"attention_decode": attention_decode, "mla_decode": mla_decode}
FILES = {"attention_decode": heads, "mla_decode": latent}
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=short
)
ops = pytest.mark.parametrize("op", FORMULAS)


def compare(op, call):
    size = call["start"] + call["x"].shape[1] + call["x"].shape[2] + 64
    return check(FORMULAS[op], getattr(reference, op), call, sum_length=size)


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norms": None, "norm_weight": None},
        {"norms": "token", "bias": True, "sinks": True},
        {"length": 5, "batch": 3, "sinks": True},
        {"length": 4, "start": 0, "heads": 2, "kv_heads": 2},
        {"length": 3, "mask": "bool"},
        {"mask": "float", "sinks": True, "bias": True},
        {"rotary_size": 8, "residual_scale": 0.7},
        {"rotary_size": 0, "batch": 1, "start": 70},
        {"size": 20, "hidden": 33, "heads": 5, "kv_heads": 1, "mask": "bool"},
        {"length": 0},
        {"length": 0, "start": 0},
        {"batch": 0, "length": 2},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_attention_decode(options, dtype):
    compare("attention_decode", heads.operands(dtype, **options))


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
        {"length": 0, "start": 0},
        {"batch": 0, "length": 2},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_mla_decode(options, dtype):
    compare("mla_decode", latent.operands(dtype, **options))


@ops
def test_any_layout(op):
    call = FILES[op].operands(length=3, mask="float")
    for name, t in call.items():
        if isinstance(t, torch.Tensor) and name not in FILES[op].KEPT:
            call[name] = as_strided_copy(t, "step2_last")
    for name in FILES[op].KEPT:  # As a cache by tokens has them.
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    call["mask"], call["cos"], call["sin"] = (call[n][:1] for n in ("mask", "cos", "sin"))
    compare(op, call)


@ops
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_codes(op, bits, group):
    more = {"query_rank": 64, "value": 32} if op == "mla_decode" else {"size": 32}
    call = FILES[op].operands(hidden=128, heads=4, length=2, **more)
    for name in ("w_q", "w_o"):
        q, scale = quantized(call[name][None], bits, group)
        call |= {name: q[0], f"{name}_scale": scale[0]}
    kind = label_of(bits, group)
    mla = op == "mla_decode"
    kinds = [kind, "float", kind, "float"] if mla else [kind, "float", "float", kind]
    call["formats"] = ", ".join(kinds)
    compare(op, call)


@ops
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("length", [1, 2])
def test_a_query_that_sees_nothing_attends_to_nothing(op, kind, length):
    call = FILES[op].operands(length=length, mask=kind)
    call["mask"][0] = False if kind == "bool" else -math.inf
    assert_identical(compare(op, call)["output 0"][0], call["x"][0])
    for name in FILES[op].KEPT:
        call[name][0, :, 0] = math.nan
    assert_identical(outputs(op, call)[0], call["x"][0])


# --- Isolation


def outputs(op, call):
    return run(FORMULAS[op], call, FILES[op].KEPT)[0]


@ops
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", None], ids=str)
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("where", ["first", "second", "x"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_hidden_numbers_do_not_reach_a_query(op, dtype, where, length, kind, value):
    """The first position of the cache is hidden from all queries of the first sequence and from
    the first query of the second one; a token of the call from those before it."""
    call = FILES[op].operands(dtype, batch=2, length=length, mask=kind)
    hidden = torch.zeros(2, length, dtype=torch.bool)
    if where == "x":
        at, hidden[:, :-1] = call["x"][:, -1:], True
    elif kind is None:
        pytest.skip("all queries see the cache")
    else:
        hidden[0], hidden[1, 0] = True, True
        no = -math.inf if kind == "float" else False
        call["mask"][0, ..., 0], call["mask"][1, :, 0, 0] = no, no
        if length > 1:
            call["mask"][1, :, 1:, 0] = 0.0 if kind == "float" else True
        at = call[FILES[op].KEPT[where == "second"]][:, :, :1]
    if where == "x" and kind is not None:
        end = call["mask"].shape[-1]
        sees = torch.ones(length, end, dtype=torch.bool).tril(end - length).expand_as(call["mask"])
        call["mask"] = (
            sees if kind == "bool" else torch.zeros(sees.shape).masked_fill(~sees, -math.inf)
        )
    want = outputs(op, call)
    at.fill_(value)
    got = outputs(op, call)
    assert_identical(got[hidden], want[hidden])
    if math.isnan(value):  # The others see it.
        assert bool(got[~hidden].isnan().all())


@pytest.mark.parametrize("length", [1, 3])
def test_numbers_that_a_query_sees(length):
    """Infinities of both signs and NaN reach a query as if it were given what it sees only."""
    scores = torch.randn(2, 2, 3, length, 8).double()
    values = torch.randn(2, 2, 8, 6).double()
    sees = torch.rand(2, 1, length, 8) < 0.6
    for feature, pair in enumerate(((1, math.inf), (-1, -math.inf), (0, math.nan))):
        values[:, :, pair[0], feature] = pair[1]
    values[:, :, 2:4, 3] = torch.tensor([math.inf, -math.inf]).double()
    got = attend(scores, values, sees, 8 - length)
    for b, s in itertools.product(range(2), range(length)):
        at = sees[b, 0, s]
        want = scores[b, :, :, s, at].softmax(-1) @ values[b, :, at]
        torch.testing.assert_close(got[b, :, :, s], want, equal_nan=True)


@ops
def test_captured_by_a_compiler(op):
    call = FILES[op].operands(length=3, mask="bool")
    names = FILES[op].KEPT
    compiled = torch.compile(FORMULAS[op], fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        run(compiled, call, names), run(FORMULAS[op], call, names), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
