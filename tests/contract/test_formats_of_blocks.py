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
from moe_ops.quant import dequantize_weight
from moe_ops.testing import seed_from
from moe_ops.weight_formats import FORMATS

pytestmark = pytest.mark.cpu_only

Call = dict[str, Any]
TAKEN = ("int8", "int4 g32", "int4 g64", "int4 g128")
REFUSED = (*STORED_GROUPS, *STORED_RECORDS)
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


def formats(op: str, name: str, kind: str) -> list[str]:
    """The argument `formats` of a call in which one weight is of this format."""
    order = ("w_q", "w_kv_a", "w_o", "w_q_a") if op == "mla_decode" else _names(op)
    return [kind if other == name else "float" for other in order]


def _names(op: str) -> tuple[str, ...]:
    return tuple(f"w_{name}" for name in WEIGHTS[op])


def fake_and_real(op: str, call: Call, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(moe_ops, op)(**call)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if torch.is_tensor(t) else t for n, t in call.items()}
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            getattr(moe_ops, op)(**fake)


each = pytest.mark.parametrize(
    ("op", "name"), [(op, f"w_{name}") for op, names in WEIGHTS.items() for name in names]
)


def depth_of(kind: str) -> int:
    """Length of a row in whole groups of the format."""
    return 800 if "g160" in kind else 768


def test_every_format_is_here():
    assert {kind.split(" ")[0] for kind in (*TAKEN, *REFUSED)} == set(FORMATS)


@each
@pytest.mark.parametrize("kind", TAKEN)
def test_taken(op, name, kind):
    call = call_of(op, 256)
    torch.manual_seed(seed_from(op))
    parts = parts_of(kind, call[name])
    weight = dequantize_weight(parts[""], parts["_scale"], kind)
    changed = {name: parts[""], f"{name}_scale": parts["_scale"]}
    got = getattr(moe_ops, op)(**{**call, **changed, "formats": formats(op, name, kind)})
    want = getattr(reference, op)(**{**wide(call), name: weight.double()})
    # Rows become integers of 8 bits, which costs about 1 % of their norm.
    assert (got.double() - want).norm() <= 0.03 * want.norm()


@each
@pytest.mark.parametrize("kind", (*REFUSED, "int4", "fp4", ""))
def test_refused(op, name, kind):
    known = kind in REFUSED
    call = call_of(op, depth_of(kind))
    parts = parts_of(kind if known else "int8", call[name])
    changed = {name: parts[""], f"{name}_scale": parts["_scale"]}
    message = (
        f"{op}: formats must have 'float', 'int8' or 'int4 g32', 'int4 g64' or 'int4 g128' for "
        f"{name}, got '{kind}'."
    )
    fake_and_real(op, {**call, **changed, "formats": formats(op, name, kind)}, message)


@each
def test_what_does_not_fit_the_format_is_refused(op, name):
    call = call_of(op, 256)
    features = call[name].shape[0]
    codes = torch.zeros(call[name].shape, dtype=torch.int8)
    scale = torch.ones(features)
    int8 = {"formats": formats(op, name, "int8")}
    fake_and_real(
        op, {**call, **int8, name: codes}, f"{op}: {name}_scale must be given for int8, got None."
    )
    with_scale = {**call, f"{name}_scale": scale}
    fake_and_real(op, with_scale, f"{op}: {name}_scale must be None for float, got shape ")
    message = f"{op}: {name} must be int8 [O, D] for int8, got bfloat16 of shape "
    fake_and_real(op, {**with_scale, **int8}, message)
    message = f"{op}: {name}_scale must be float32 [{features}] for int8, got float16 of shape "
    fake_and_real(op, {**with_scale, **int8, name: codes, f"{name}_scale": scale.half()}, message)
    four = {name: codes.view(torch.uint8), "formats": formats(op, name, "int4 g32")}
    groups = codes.shape[1] * 2 // 32
    message = f"{op}: {name}_scale must be float32 [{features}, {groups}] for int4 g32, got float32"
    fake_and_real(op, {**with_scale, **four}, message)
    fp8 = call[name].to(torch.float8_e4m3fn)
    fake_and_real(op, {**call, name: fp8}, f"{op}: {name} must be bfloat16 like x, got float8_e4")


@pytest.mark.parametrize("op", WEIGHTS)
def test_number_of_names(op):
    call, count = call_of(op, 256), len(WEIGHTS[op])
    message = f"{op}: formats must be one name or one for each of {count} weights, got 'float, int8"
    fake_and_real(op, {**call, "formats": ["float", "int8", "int8", "int8", "int8"]}, message)


def test_the_weight_of_latents_is_a_float():
    call = call_of("mla_decode", 256)
    codes = torch.zeros(call["w_kv_b"].shape, dtype=torch.int8)
    with pytest.raises(ValueError, match="w_kv_b must be bfloat16 like x, got int8"):
        moe_ops.mla_decode(**{**call, "w_kv_b": codes})
