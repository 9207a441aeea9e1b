"""Blocks with dense layers take some of the formats of grouped_gemm_quantized, and name those in
the sentence with which they refuse the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.helpers.attention_block import wide
from tests.helpers.quantized import STORED_GROUPS, STORED_RECORDS, any_format
from tests.ops import test_attention_decode, test_gated_mlp_decode, test_mla_decode
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops import reference
from moe_ops.quant import dequantize
from moe_ops.reference._codes import format_of
from moe_ops.testing import seed_from

pytestmark = pytest.mark.cpu_only

Call = dict[str, Any]
TAKEN = ("int8", "int4-32", "int4-64", "int4-128")
# What the sentence calls the others.
REFUSED = {
    "int8 groups": "int8 in groups",
    "int8 g160": "int8 in groups",
    "int4 zero": "4 bits with scales in bfloat16",
    "int4 float16": "4 bits with scales in float16",
    "int4 g96 zero": "4 bits in groups of 96",
    "int4 g256": "4 bits in groups of 256",
    "mxfp4": "MXFP4",
    "fp8": "fp8 in blocks",
    "q4_k": "q4_K",
    "q6_k": "q6_K",
}
WEIGHTS = {
    "gated_mlp_decode": ("gate", "up", "down"),
    "attention_decode": ("q", "k", "v", "o"),
    "mla_decode": ("q_a", "q", "kv_a", "o"),
}


def call_of(op: str, depth: int) -> Call:
    """A call in which every weight has rows of `depth`, a multiple of 32."""
    size = 64 if depth % 64 == 0 else 80
    heads = depth // size
    if op == "gated_mlp_decode":
        return test_gated_mlp_decode.operands(torch.bfloat16, hidden=depth, width=depth)
    if op == "attention_decode":
        return test_attention_decode.operands(
            torch.bfloat16, hidden=depth, heads=heads, kv_heads=1, size=size
        )
    return test_mla_decode.operands(
        torch.bfloat16, hidden=depth, heads=heads, value=size, query_rank=depth
    )


def parts_of(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = any_format(kind, 1, *weight.shape)
    return {part: t[0] for part, t in parts.items() if part != "_zero"}


each = pytest.mark.parametrize(
    ("op", "name"), [(op, f"w_{name}") for op, names in WEIGHTS.items() for name in names]
)


def depth_of(kind: str) -> int:
    """Length of a row in whole groups of the format."""
    return 800 if kind == "int8 g160" else 768


def test_every_format_is_here():
    assert set(REFUSED) == {*STORED_GROUPS, *STORED_RECORDS}
    found = set()
    for kind in (*TAKEN, *REFUSED):
        parts = any_format(kind, 1, 8, depth_of(kind))
        found.add(format_of(parts[""], parts["_scale"]))
    assert found == {"int8", "int8 groups", "int4", "mxfp4", "fp8", "q4_k", "q6_k"}


@each
@pytest.mark.parametrize("kind", TAKEN)
def test_taken(op, name, kind):
    call = call_of(op, 256)
    torch.manual_seed(seed_from(op))
    parts = parts_of(kind, call[name])
    weight = dequantize(parts[""][None], parts["_scale"][None])[0]
    got = getattr(moe_ops, op)(**{**call, name: parts[""], f"{name}_scale": parts["_scale"]})
    want = getattr(reference, op)(**{**wide(call), name: weight.double()})
    # Rows become integers of 8 bits, which costs about 1 % of their norm.
    assert (got.double() - want).norm() <= 0.03 * want.norm()


@each
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(op, name, kind):
    call = call_of(op, depth_of(kind))
    parts = parts_of(kind, call[name])
    weight, scale = parts[""], parts["_scale"]
    dtypes = [str(t.dtype).removeprefix("torch.") for t in (weight, scale)]
    message = (
        f"{op}: {name} must be bfloat16 like x, int8 with float32 scales [O], or 4 bits (uint8) "
        f"with float32 scales [O, K/G] of G = 32, 64 or 128, got {REFUSED[kind]} ({dtypes[0]} of "
        f"shape {list(weight.shape)} with {dtypes[1]} scales of shape {list(scale.shape)})."
    )
    changed = {**call, name: weight, f"{name}_scale": scale}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(moe_ops, op)(**changed)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if torch.is_tensor(t) else t for n, t in changed.items()}
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            getattr(moe_ops, op)(**fake)


@each
def test_codes_without_scales_and_scales_without_codes(op, name):
    call = call_of(op, 256)
    function = getattr(moe_ops, op)
    codes = torch.zeros(call[name].shape, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"{op}: {name}_scale must be given beside codes, got No"):
        function(**{**call, name: codes})
    scale = torch.ones(call[name].shape[0])
    words = "must be None beside a weight that is no codes, got shape"
    with pytest.raises(ValueError, match=rf"{op}: {name}_scale {words} \[\d+\] beside bfloat16"):
        function(**{**call, f"{name}_scale": scale})
    fp8 = call[name].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{op}: {name} must be bfloat16 .*got fp8.*without scale"):
        function(**{**call, name: fp8})


def test_the_weight_of_latents_is_a_float():
    call = call_of("mla_decode", 256)
    codes = torch.zeros(call["w_kv_b"].shape, dtype=torch.int8)
    with pytest.raises(ValueError, match="w_kv_b must be bfloat16 like x, got int8"):
        moe_ops.mla_decode(**{**call, "w_kv_b": codes})
