"""The batch-invariant mode: a token's output has bitwise identical results alone, among 6 others
and among 512, wherever it stands, however the others are routed, with one thread and with two.

Every registered op that maps tokens to tokens has cases in CASES, at least that of its test file
(`by_token` in OP_CASES); a new one fails test_every_op_is_covered until it has, or is named in
NOT_BY_TOKEN with the reason. The file is long
because it is a table of all ops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.helpers.ffn import gated_act_magnitude, moe_ffn_magnitude
from tests.helpers.fp8 import check_grouped_gemm_fp8, check_moe_ffn_fp8
from tests.helpers.fresh_python import run_python
from tests.helpers.isas import ISAS, has_own_kernels, run_python_at
from tests.helpers.moe import build_moe
from tests.helpers.quantized import (
    check_grouped_gemm_quantized,
    label_of,
    moe_ffn_in_integers,
    quantized,
    weight_config,
)
from torch import Tensor

import moe_ops
from moe_ops import _library, reference
from moe_ops.expert_weights import packing
from moe_ops.layers import (
    AttentionExperts,
    Experts,
    GateRouter,
    KVCache,
    Router,
    TopKRouter,
)
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.quant import quantize_fp8_blocks, quantize_weight
from moe_ops.testing import (
    DTYPES,
    acc_dtype,
    assert_identical,
    check_against_reference,
    eps,
    seed_from,
    short,
)

from . import every_op

pytestmark = pytest.mark.cpu_only

NUM_TOKENS = 513
# The one token of the last expert, and one of the many of expert 0.
RARE, COMMON = 5, 6

# Registered ops of which no output belongs to one token, and why.
NOT_BY_TOKEN = {
    "attention_decode": "a token's keys are other tokens: tests/contract/test_attention_steps.py",
    "dispatch_layout": "rounds nothing",
    "expert_choice_router": "experts choose among all tokens of the call",
    "grouped_gemm_fp8_wgrad": "sums over tokens",
    "grouped_gemm_fp8_wgrad_accumulate": "sums over tokens",
    "grouped_gemm_quantized_exact": "of training: test_training_through_quantized_experts",
    "grouped_gemm_wgrad": "sums over tokens",
    "grouped_sum": "sums over tokens",
    "mla_decode": "as attention_decode: tests/contract/test_attention_steps.py",
    "moe_ffn_lora_fwd": "tests/layers/test_expert_lora.py",
    "moe_ffn_quantized_fwd": "of training: test_training_through_quantized_experts",
    "moa_attention": "a token's keys are other tokens: tests/ops/test_moa_attention.py",
    "pack_experts": "has no tokens",
    "permute": "copies rows",
    "quantize_fp8_columns": "rounds 128 tokens together",
    "sort_by_expert": "rounds nothing",
}

Kwargs = dict[str, Any]
NOT_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Case:
    """op(**tokens, **fixed) maps tensors of NUM_TOKENS rows to one or more of as many rows. check:
    compares it with the reference in fp64, within the bounds that hold without the mode."""

    op: Callable[..., Any]
    tokens: dict[str, Tensor]
    fixed: Kwargs
    check: Callable[[], Any] | None = None

    def run(self, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        result = self.op(**{name: t[rows] for name, t in self.tokens.items()}, **self.fixed)
        return [result] if isinstance(result, Tensor) else list(result)


def some_tokens() -> Iterator[Tensor]:
    """Yields the tokens of a call: 1, 7 or 64 of them, and all in another order."""
    for token in (0, RARE, COMMON, NUM_TOKENS - 1):
        yield torch.tensor([token])
    order = torch.randperm(NUM_TOKENS)
    yield torch.cat([torch.tensor([RARE, COMMON]), order[:5]])
    yield order[:64]
    yield order


def check_invariant(case: Case, thread_counts: tuple[int, ...] = (1, 2)) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = case.run()
        for number in thread_counts:
            torch.set_num_threads(number)
            for rows in some_tokens():
                for i, out in enumerate(case.run(rows)):
                    what = f"output {i} of {len(rows)} tokens with {number} threads"
                    assert_identical(out, whole[i][rows], what)
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- cases

CASES: dict[str, dict[str, tuple[Callable[[torch.dtype], Case], tuple[torch.dtype, ...]]]] = {}


def add(
    name: str,
    label: str,
    build: Callable[..., Case],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **options: Any,
) -> None:
    CASES.setdefault(name, {})[label] = (functools.partial(build, **options), dtypes)


def skewed_ids(num_experts: int, top_k: int) -> Tensor:
    """topk_ids: 400 tokens begin with expert 0, one has the last expert, some slots are empty."""
    ids = torch.randint(max(1, num_experts - 1), (NUM_TOKENS, top_k))
    ids[:400, 0] = 0
    ids[torch.rand(ids.shape) < 0.05] = -1
    ids[RARE] = num_experts - 1
    ids[COMMON, 0] = 0
    return ids.int()


# --- the whole block


def ffn_case(
    dtype: torch.dtype,
    op: Callable[..., Any],
    hidden: int,
    intermediate: int,
    experts: int = 4,
    activation: str = "swiglu",
    interleaved: bool = False,
    bias: bool = False,
    on_input: bool = False,
    transposed: bool = False,
) -> Case:
    width = intermediate * (2 if activation in GATED_ACTIVATIONS else 1)
    tokens = {
        "x": torch.randn(NUM_TOKENS, hidden).to(dtype),
        "topk_weights": torch.rand(NUM_TOKENS, 2).to(acc_dtype(dtype)) + 0.1,
        "topk_ids": skewed_ids(experts, 2),
    }
    fixed: Kwargs = {
        "w_gate_up": (torch.randn(experts, width, hidden) / hidden**0.5).to(dtype),
        "w_down": (torch.randn(experts, hidden, intermediate) / intermediate**0.5).to(dtype),
    }
    if transposed:
        fixed = {name: w.mT.contiguous().mT for name, w in fixed.items()}
    if bias:
        fixed["b_gate_up"] = torch.randn(experts, width).to(dtype)
        fixed["b_down"] = torch.randn(experts, hidden).to(dtype)
    fixed |= {"activation": activation, "interleaved": interleaved}
    fixed["apply_router_weight_on_input"] = on_input

    def check() -> None:
        check_against_reference(
            op,
            reference.moe_ffn,
            tokens | fixed,
            magnitude=moe_ffn_magnitude,
            sum_length=max(hidden, width),
            steps=2,
        )

    return Case(op, tokens, fixed, check)


def moe_ffn_fwd_case(dtype: torch.dtype, **sizes: Any) -> Case:
    def op(**call: Any) -> tuple[Tensor, Tensor]:
        y, preact, _, _, slot_to_row = torch.ops.moe_ops.moe_ffn_fwd(**call)
        return y, preact[slot_to_row.long()]  # Slots without an expert have a row of zeros.

    case = ffn_case(dtype, op, **sizes)
    case.check = None
    return case


def moe_ffn_packed_case(dtype: torch.dtype, **sizes: Any) -> Case:
    def op(**call: Any) -> Tensor:
        return moe_ops.moe_ffn_packed(**call, **packed)

    case = ffn_case(dtype, op, **sizes)
    halves = case.fixed["activation"] in GATED_ACTIVATIONS and not case.fixed["interleaved"]
    packed = {
        "packed_gate_up": moe_ops.pack_experts(case.fixed["w_gate_up"], halves=halves),
        "packed_down": moe_ops.pack_experts(case.fixed["w_down"]),
    }
    return case


def moe_ffn_quantized_case(
    dtype: torch.dtype, bits: int, group: int = 32, x_scale: bool = False, **sizes: Any
) -> Case:
    case = ffn_case(dtype, moe_ops.moe_ffn_quantized, **sizes)
    for name in ("w_gate_up", "w_down"):
        codes, scale = quantized(case.fixed[name], bits, group)
        case.fixed |= {name: codes, f"{name}_scale": scale}
    case.fixed["format"] = label_of(bits, group)
    if x_scale:
        case.fixed["x_scale"] = torch.rand(sizes["hidden"]) + 0.5

    def check() -> None:
        call = case.tokens | case.fixed
        expected = moe_ffn_in_integers(call)
        error = (moe_ops.moe_ffn_quantized(**call).double() - expected).norm()
        # The portable level rounds a product before it rounds it to an integer.
        slack = 5e-3 if _library.cpu_isa() == "portable" else 1e-3
        assert error <= (eps(dtype) + slack) * expected.norm()

    case.check = check
    return case


def moe_ffn_fp8_case(dtype: torch.dtype, **sizes: Any) -> Case:
    case = ffn_case(dtype, moe_ops.moe_ffn_fp8, **sizes)
    for name in ("w_gate_up", "w_down"):
        codes, scale = quantize_fp8_blocks(case.fixed[name])
        case.fixed |= {name: codes, f"{name}_scale": scale}
    case.check = lambda: check_moe_ffn_fp8(case.tokens | case.fixed)
    return case


# On both sides of what is narrow, of a step of k (192), of the depth of a panel (1024) and of half
# of it, and with rows that are no whole vectors.
FFN_SIZES: dict[str, Kwargs] = {
    "narrow": {"hidden": 64, "intermediate": 32},
    "narrow-odd": {"hidden": 33, "intermediate": 17, "bias": True},
    "narrow-many": {"hidden": 32, "intermediate": 16, "experts": 40},
    "interleaved": {
        "hidden": 96,
        "intermediate": 160,
        "activation": "swiglu_oai",
        "interleaved": True,
        "bias": True,
    },
    "plain": {"hidden": 130, "intermediate": 131, "activation": "relu2", "on_input": True},
    "deep": {"hidden": 1100, "intermediate": 72},
    "deep-down": {"hidden": 72, "intermediate": 1100},
}
TRANSPOSED: dict[str, Kwargs] = {
    "transposed": {"hidden": 96, "intermediate": 160},
    "transposed-odd": {"hidden": 65, "intermediate": 97},
    "transposed-deep": {"hidden": 1100, "intermediate": 260},
}
for label, sizes in FFN_SIZES.items():
    add("moe_ffn", label, ffn_case, op=moe_ops.moe_ffn, **sizes)
    add("moe_ffn_packed", label, moe_ffn_packed_case, **sizes)
for label, sizes in TRANSPOSED.items():
    add("moe_ffn", label, ffn_case, op=moe_ops.moe_ffn, transposed=True, **sizes)
for label in ("narrow", "interleaved"):
    add("moe_ffn_fwd", label, moe_ffn_fwd_case, **FFN_SIZES[label])
for label, options in {
    "int8": {"bits": 8, "hidden": 64, "intermediate": 32},
    "int8-odd": {"bits": 8, "hidden": 131, "intermediate": 67, "bias": True},
    "int8-deep": {"bits": 8, "hidden": 1100, "intermediate": 72},
    "int8-scaled": {"bits": 8, "hidden": 96, "intermediate": 160, "x_scale": True},
    "int4": {"bits": 4, "group": 32, "hidden": 96, "intermediate": 160},
    "int4 g64": {"bits": 4, "group": 64, "hidden": 1088, "intermediate": 64},
    "int4 g128": {"bits": 4, "group": 128, "hidden": 128, "intermediate": 256},
}.items():
    add("moe_ffn_quantized", label, moe_ffn_quantized_case, NOT_DOUBLE, **options)
for label, options in {
    "blocks": {"hidden": 130, "intermediate": 150},
    "interleaved": {
        "hidden": 33,
        "intermediate": 300,
        "activation": "swiglu_oai",
        "interleaved": True,
        "bias": True,
    },
    "deep": {"hidden": 1100, "intermediate": 64, "on_input": True},
}.items():
    add("moe_ffn_fp8", label, moe_ffn_fp8_case, NOT_DOUBLE, **options)


# --- products


def by_expert(op: Callable[..., Tensor], num_experts: int) -> Callable[..., Tensor]:
    """`op` on rows in any order, of which `expert` says where they belong."""

    def run(expert: Tensor, a: Tensor, a_scale: Tensor | None = None, **fixed: Any) -> Tensor:
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=num_experts)
        fixed["expert_offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        if a_scale is not None:
            fixed["a_scale"] = a_scale[order]
        out = op(a=a[order], **fixed)
        return torch.empty_like(out).index_copy_(0, order, out)

    return run


def row_experts(num_experts: int) -> Tensor:
    return skewed_ids(num_experts, 1)[:, 0].clamp_min(0).long()


def grouped_gemm_case(dtype: torch.dtype, k: int, o: int, transposed: bool = False) -> Case:
    b = (torch.randn(4, o, k) / k**0.5).to(dtype)
    tokens = {"a": torch.randn(NUM_TOKENS, k).to(dtype), "expert": row_experts(4)}
    fixed = {"b": b.mT.contiguous().mT if transposed else b, "bias": torch.randn(4, o).to(dtype)}
    op = by_expert(moe_ops.grouped_gemm, 4)

    def check() -> None:
        ref = by_expert(reference.grouped_gemm, 4)
        check_against_reference(op, ref, {**tokens, **fixed}, sum_length=k)

    return Case(op, tokens, fixed, check)


def grouped_gemm_fp8_case(dtype: torch.dtype, k: int, o: int) -> Case:
    a, a_scale = reference.quantize_fp8(torch.randn(NUM_TOKENS, k))
    b, b_scale = quantize_fp8_blocks(torch.randn(4, o, k))
    fixed: Kwargs = {"b": b, "b_scale": b_scale, "out_dtype": dtype}
    expert = row_experts(4)
    case = Case(
        by_expert(moe_ops.grouped_gemm_fp8, 4),
        {"a": a, "a_scale": a_scale, "expert": expert},
        fixed,
    )
    order = expert.argsort(stable=True)
    call = {
        "a": a[order],
        "a_scale": a_scale[order],
        "b": b,
        "b_scale": b_scale,
        "expert_offsets": torch.tensor([0, *torch.bincount(expert, minlength=4)]).cumsum(0).int(),
    }
    case.check = lambda: check_grouped_gemm_fp8(call, dtype)
    return case


def grouped_gemm_quantized_case(dtype: torch.dtype, k: int, o: int, bits: int) -> Case:
    tokens = {"a": torch.randn(NUM_TOKENS, k).to(dtype), "expert": row_experts(4)}
    b, b_scale = quantized(torch.randn(4, o, k), bits, 32)
    op = by_expert(moe_ops.grouped_gemm_quantized, 4)
    order = tokens["expert"].argsort(stable=True)
    counts = torch.bincount(tokens["expert"], minlength=4)
    fixed: Kwargs = {"b": b, "b_scale": b_scale, "format": label_of(bits)}
    call = {"a": tokens["a"][order], **fixed}
    call["expert_offsets"] = torch.tensor([0, *counts]).cumsum(0).int()
    return Case(op, tokens, fixed, lambda: check_grouped_gemm_quantized(call))


for bits in (8, 4):
    add(
        "grouped_gemm_quantized",
        f"int{bits}",
        grouped_gemm_quantized_case,
        NOT_DOUBLE,
        k=1088,
        o=72,
        bits=bits,
    )
for label, shape in {
    "whole": (64, 64),
    "odd": (33, 31),
    "deep": (1100, 40),
    "wide": (40, 700),
}.items():
    add("grouped_gemm", label, grouped_gemm_case, k=shape[0], o=shape[1])
    add(
        "grouped_gemm",
        f"{label}-transposed",
        grouped_gemm_case,
        k=shape[0],
        o=shape[1],
        transposed=True,
    )
    add("grouped_gemm_fp8", label, grouped_gemm_fp8_case, NOT_DOUBLE, k=shape[0], o=shape[1])


def linear_map_case(dtype: torch.dtype, h: int, o: int, experts: int) -> Case:
    tokens = {"x": torch.randn(NUM_TOKENS, h).to(dtype), "topk_ids": skewed_ids(experts, 2)}
    fixed = {
        "w": (torch.randn(experts, o, h) / h**0.5).to(dtype),
        "bias": torch.randn(experts, o).to(dtype),
    }
    ours, ref = moe_ops.moe_linear_map, reference.moe_linear_map
    return Case(
        ours,
        tokens,
        fixed,
        lambda: check_against_reference(ours, ref, tokens | fixed, sum_length=h),
    )


def linear_reduce_case(dtype: torch.dtype, d: int, h: int, experts: int) -> Case:
    tokens = {
        "h": torch.randn(NUM_TOKENS, 2, d).to(dtype),
        "topk_weights": torch.rand(NUM_TOKENS, 2).to(acc_dtype(dtype)),
        "topk_ids": skewed_ids(experts, 2),
    }
    fixed = {"w": (torch.randn(experts, h, d) / d**0.5).to(dtype)}
    ours, ref = moe_ops.moe_linear_reduce, reference.moe_linear_reduce
    return Case(
        ours,
        tokens,
        fixed,
        lambda: check_against_reference(ours, ref, tokens | fixed, sum_length=2 * d, steps=1),
    )


for label, (rows, columns, experts) in {
    "narrow": (64, 32, 4),
    "narrow-odd": (33, 17, 4),
    "wide": (96, 160, 4),
    "deep": (1100, 36, 4),
}.items():
    add("moe_linear_map", label, linear_map_case, h=rows, o=columns, experts=experts)
    add("moe_linear_reduce", label, linear_reduce_case, d=rows, h=columns, experts=experts)


# --- every expert on every token


def all_experts_ffn_case(
    dtype: torch.dtype, h: int, i: int, o: int, activation: str, fwd: bool
) -> Case:
    def op(**call: Any) -> Any:
        if not fwd:
            return moe_ops.all_experts_ffn(**call)
        y, preact = torch.ops.moe_ops.all_experts_ffn_fwd(**call)
        return y, preact.transpose(0, 1)

    fixed: Kwargs = {
        "w_up": (torch.randn(3, i, h) / h**0.5).to(dtype),
        "w_down": (torch.randn(3, o, i) / i**0.5).to(dtype),
        "input_ids": torch.tensor([1, 0, 1]),
        "b_up": torch.randn(3, i).to(dtype),
        "b_down": torch.randn(3, o).to(dtype),
        "activation": activation,
    }
    return Case(op, {"x": torch.randn(NUM_TOKENS, 2, h).to(dtype)}, fixed)


for op in ("all_experts_ffn", "all_experts_ffn_fwd"):
    fwd = op == "all_experts_ffn_fwd"
    add(op, "whole", all_experts_ffn_case, h=32, i=64, o=32, activation="relu", fwd=fwd)
    add(op, "odd", all_experts_ffn_case, h=33, i=31, o=17, activation="gelu", fwd=fwd)
    add(op, "deep", all_experts_ffn_case, h=400, i=300, o=7, activation="silu", fwd=fwd)


def mix_expert_outputs_case(dtype: torch.dtype, e: int, o: int, m: int, norm: bool) -> Case:
    tokens = {
        "outputs": torch.randn(NUM_TOKENS, e, o).to(dtype),
        "weights": torch.randn(NUM_TOKENS, m, e).to(dtype),
        "factor": torch.randn(NUM_TOKENS, m, o).to(dtype),
    }
    fixed: Kwargs = {"activation": "silu"}
    if norm:
        names = ("norm_weight", "norm_bias", "mean", "var")
        fixed |= {name: torch.rand(e, o).to(acc_dtype(dtype)) + 0.5 for name in names}
    return Case(lambda **call: moe_ops.mix_expert_outputs(**call)[0], tokens, fixed)


add("mix_expert_outputs", "whole", mix_expert_outputs_case, e=8, o=32, m=4, norm=False)
add("mix_expert_outputs", "odd", mix_expert_outputs_case, e=5, o=17, m=3, norm=True)


# --- rows by themselves


def topk_case(dtype: torch.dtype, experts: int, bias: bool = False, **options: Any) -> Case:
    fixed = {"top_k": 2, **options}
    if bias:
        fixed["expert_bias"] = torch.randn(experts).to(acc_dtype(dtype))
    logits = torch.randn(NUM_TOKENS, experts).to(dtype)
    return Case(moe_ops.topk_router, {"router_logits": logits}, fixed)


add("topk_router", "few", topk_case, experts=4)
add("topk_router", "few-sigmoid", topk_case, experts=7, score_func="sigmoid", renormalize=True)
add("topk_router", "some", topk_case, experts=16, topk_first=True)
add("topk_router", "many", topk_case, experts=130, renormalize=True)
add(
    "topk_router",
    "groups",
    topk_case,
    experts=64,
    bias=True,
    score_func="sigmoid",
    num_groups=8,
    num_topk_groups=4,
    group_score="top2_sum",
)


def topp_case(dtype: torch.dtype, experts: int) -> Case:
    logits = torch.randn(NUM_TOKENS, experts).to(dtype)
    fixed = {"top_p": 0.6, "max_k": min(4, experts), "renormalize": True}
    return Case(moe_ops.topp_router, {"router_logits": logits}, fixed)


add("topp_router", "few", topp_case, experts=4)
add("topp_router", "many", topp_case, experts=70)


def router_linear_case(dtype: torch.dtype, h: int, experts: int) -> Case:
    tokens = {"x": torch.randn(NUM_TOKENS, h).to(dtype)}
    fixed = {
        "weight": (torch.randn(experts, h) / h**0.5).to(dtype),
        "bias": torch.randn(experts).to(dtype),
    }
    ours, ref = moe_ops.router_linear, reference.router_linear
    return Case(
        ours,
        tokens,
        fixed,
        lambda: check_against_reference(ours, ref, tokens | fixed, sum_length=h),
    )


add("router_linear", "few", router_linear_case, h=64, experts=4)
add("router_linear", "odd", router_linear_case, h=131, experts=9)


def unpermute_case(dtype: torch.dtype, size: int) -> Case:
    def op(rows: Tensor, topk_weights: Tensor) -> Tensor:
        slots = torch.arange(rows.shape[0] * 2, dtype=torch.int32)
        offsets = torch.tensor([0, len(slots)], dtype=torch.int32)
        return moe_ops.unpermute(rows.flatten(0, 1), offsets, slots.view(-1, 2), topk_weights)

    weights = torch.rand(NUM_TOKENS, 2).to(acc_dtype(dtype))
    return Case(
        op, {"rows": torch.randn(NUM_TOKENS, 2, size).to(dtype), "topk_weights": weights}, {}
    )


add("unpermute", "odd", unpermute_case, size=77)


def gated_act_case(dtype: torch.dtype, activation: str, interleaved: bool) -> Case:
    fixed = {"activation": activation, "interleaved": interleaved}
    tokens = {"gate_up": torch.randn(NUM_TOKENS, 2 * 37).to(dtype)}
    ours, ref = moe_ops.gated_act, reference.gated_act
    return Case(
        ours,
        tokens,
        fixed,
        lambda: check_against_reference(ours, ref, tokens | fixed, magnitude=gated_act_magnitude),
    )


add("gated_act", "swiglu", gated_act_case, activation="swiglu", interleaved=False)
add("gated_act", "oai", gated_act_case, activation="swiglu_oai", interleaved=True)


def quantize_fp8_case(dtype: torch.dtype) -> Case:
    def op(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = moe_ops.quantize_fp8(x)
        return codes.view(torch.uint8), scale

    return Case(op, {"x": torch.randn(NUM_TOKENS, 300).to(dtype)}, {})


add("quantize_fp8", "blocks", quantize_fp8_case, NOT_DOUBLE)


def norm_case(dtype: torch.dtype, size: int) -> Case:
    tokens = {name: torch.randn(NUM_TOKENS, size).to(dtype) for name in ("x", "residual")}
    return Case(moe_ops.add_rms_norm, tokens, {"weight": torch.randn(size).to(dtype)})


add("add_rms_norm", "odd", norm_case, size=77)
add("add_rms_norm", "whole", norm_case, size=256)


def rotary_case(dtype: torch.dtype) -> Case:
    def op(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return moe_ops.rotary(t[None], cos, sin)[0]

    angles = torch.randn(NUM_TOKENS, 10)
    tokens = {"t": torch.randn(NUM_TOKENS, 3, 20).to(dtype)}
    tokens |= {"cos": angles.cos().to(acc_dtype(dtype)), "sin": angles.sin().to(acc_dtype(dtype))}
    return Case(op, tokens, {})


add("rotary", "heads", rotary_case)


# --- the calls that tests of all ops have of one


def every_op_case(dtype: torch.dtype, op: str) -> Case:
    sizes = every_op.LargerSizes(dtype)
    sizes.t = NUM_TOKENS
    fixed = every_op.CASES[op].call(sizes)
    tokens = {name: fixed.pop(name) for name in every_op.CASES[op].by_token}
    return Case(getattr(moe_ops, op), tokens, fixed)


for name in every_op.OPS:
    if every_op.CASES[name].by_token:
        add(name, "every-op", every_op_case, op=name)


def peer_ffn_fwd_case(dtype: torch.dtype) -> Case:
    case = every_op_case(dtype, "peer_ffn")
    return dataclasses.replace(case, op=torch.ops.moe_ops.peer_ffn_fwd)


add("peer_ffn_fwd", "every-op", peer_ffn_fwd_case)


# -------------------------------------------------------------------------------------------- tests


def registered_forward_ops() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    ops = {name.split("::")[1].split(".")[0] for name in names if name.startswith("moe_ops::")}
    return {name for name in ops if "_bwd" not in name}


def test_every_op_is_covered():
    assert registered_forward_ops() == set(CASES) | set(NOT_BY_TOKEN)
    assert not set(CASES) & set(NOT_BY_TOKEN)


PARAMETERS = [
    pytest.param(build, dtype, id=f"{op}-{label}-{short(dtype)}")
    for op, cases in CASES.items()
    for label, (build, dtypes) in cases.items()
    for dtype in dtypes
]


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    with moe_ops.batch_invariant():
        yield


@pytest.mark.parametrize(("build", "dtype"), PARAMETERS)
def test_op(build, dtype):
    case = build(dtype)
    check_invariant(case)
    if case.check is not None:
        case.check()


def run_all(every: bool) -> None:
    """All cases, in a process of its own, at the level of instructions that it was started with;
    without `every`, those for which that level has kernels of its own."""
    failed = []
    with moe_ops.batch_invariant():
        for parameter in PARAMETERS:
            build, dtype = parameter.values
            eight_bits = any(word in parameter.id for word in ("quantized", "fp8"))
            if not every and not has_own_kernels(_library.cpu_isa(), dtype, eight_bits):
                continue
            torch.manual_seed(seed_from(parameter.id))
            case = build(dtype)
            try:
                check_invariant(case, (1,))  # How threads share work is the same at all levels.
                if every and case.check is not None:  # tests/sweep compares values in the mode.
                    case.check()
            except AssertionError as error:
                failed.append(f"{parameter.id}: {error}")
    assert not failed, "\n".join(failed)


# --- layers


def moe(dtype: torch.dtype, pack_weights: bool = False, **options: Any) -> torch.nn.Module:
    layer = build_moe(**{"hidden_size": 96, "num_experts": 8, "top_k": 2} | options)
    layer = layer.to(dtype).eval()
    if pack_weights:
        layer.pack_weights()
    return layer


def quantized_bank(dtype: torch.dtype, format: str, group: int | None = None) -> torch.nn.Module:
    layer = moe(dtype, intermediate_size=64)
    layer.experts = moe_ops.quantize(layer.experts, weight_config(format, group))
    return layer


def experts_from_dense(dtype: torch.dtype, **options: Any) -> Callable[[Tensor], Tensor]:
    bank = Experts(3, 96, 40, bias=True, **options).to(dtype)
    return lambda x: bank.mix(x, x[:, :3])


LAYERS: dict[str, Callable[[torch.dtype], Callable[[Tensor], Tensor]]] = {
    "mixtral": functools.partial(moe, router="mixtral", intermediate_size=160),
    "deepseek": functools.partial(
        moe,
        router="deepseek_v3",
        num_experts=64,
        intermediate_size=48,
        num_shared_experts=1,
        num_topk_groups=4,
    ),
    "qwen2": functools.partial(
        moe, intermediate_size=48, shared_intermediate_size=70, shared_expert_gate=True
    ),
    "llama4": functools.partial(moe, router="llama4", top_k=1, intermediate_size=64),
    "dbrx": functools.partial(moe, router="dbrx", intermediate_size=33),
    "phimoe": functools.partial(moe, router="phimoe", intermediate_size=33),
    "gpt-oss": functools.partial(
        moe,
        router="gpt_oss",
        intermediate_size=80,
        activation="swiglu_oai",
        interleaved=True,
        bias=True,
    ),
    "gelu": functools.partial(
        moe, intermediate_size=31, activation="gelu", num_shared_experts=1, num_experts=4
    ),
    "topp": functools.partial(moe, kind="topp", intermediate_size=32),
    "packed": functools.partial(moe, intermediate_size=160, pack_weights=True),
    "int8": functools.partial(quantized_bank, format="int8"),
    "int4": functools.partial(quantized_bank, format="int4", group=32),
    "dense": functools.partial(experts_from_dense, activation="relu"),
    "dense-gated": functools.partial(experts_from_dense, activation="swiglu"),
    "mlp-gate": lambda dtype: gate_router(GateRouter(96, 8, 2, gate="mlp", gate_size=24), dtype),
    "cosine-gate": lambda dtype: gate_router(
        GateRouter(96, 8, 2, gate="cosine", gate_size=24), dtype
    ),
    "output-size": lambda dtype: two_products(dtype),
}


def gate_router(router: Router, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    router = router.to(dtype).eval()
    return lambda x: tuple(router(x))


def two_products(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    bank = Experts(4, 96, 24, output_size=17, activation="gelu").to(dtype)
    router = TopKRouter(96, 4, 2).to(dtype)

    def run(x: Tensor) -> Tensor:
        _, weights, ids = router(x)
        return bank(x, weights, ids)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, dtype):
    layer = LAYERS[name](dtype)
    case = Case(lambda x: layer(x), {"x": torch.randn(NUM_TOKENS, 96).to(dtype)}, {})
    with torch.no_grad():
        check_invariant(case)
    check_invariant(case)  # With a graph for backward.


@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa, request):
    if isa == _library.cpu_isa():
        pytest.skip("the level of this process, which test_op has run at")
    every = request.config.getoption("--full")
    code = f"from tests.contract.test_batch_invariance import run_all; run_all({every})"
    run = run_python_at(isa, "-c", code)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
def test_attention_layer_token_by_token(kind, dtype):
    router = TopKRouter(96, 8, 2)
    layer = AttentionExperts(router, num_kv_heads=2, head_size=24, kind=kind, bias=True)
    layer = layer.to(dtype).eval()
    x = torch.randn(2, 90, 96).to(dtype)
    with torch.no_grad():
        whole = layer(x)
        assert_identical(layer(x[1:]), whole[1:])
        cache = KVCache()
        steps = [layer(part, cache=cache) for part in x.split([40, 1, 1, 7, 1, 40], 1)]
    assert_identical(torch.cat(steps, 1), whole)


# --- the switch (tests/package/test_numerics.py has threads, tasks and nested blocks)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_variable(value, on):
    modes = "moe_ops.is_batch_invariant_enabled(), moe_ops._library.batch_invariant()"
    code = f"import moe_ops; print({modes})"
    run = run_python("-c", code, env={"MOE_OPS_BATCH_INVARIANT": value})
    assert run.stdout.split() == [str(on), str(on)]


def test_compiled_code_follows_the_setting():
    layer = LAYERS["qwen2"](torch.float32)
    x = torch.randn(NUM_TOKENS, 96)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for mode in (False, True, False, True):
            with moe_ops.batch_invariant(mode):
                if mode:
                    assert_identical(compiled(x), layer(x))
                    assert_identical(compiled(x[:1]), compiled(x)[:1])
                else:
                    torch.testing.assert_close(compiled(x), layer(x))


def test_copies_that_a_bank_made_by_itself_are_not_used(monkeypatch):
    monkeypatch.setattr(packing, "ROWS_PER_EXPERT", 8)
    layer = moe(torch.float32, intermediate_size=512)
    x = torch.randn(NUM_TOKENS, 96)
    with torch.no_grad(), moe_ops.set_packing_policy("auto"), moe_ops.batch_invariant():
        before = layer(x)
        for _ in range(8):
            layer(x)
        assert moe_ops.packed_weight_bytes(layer) == 0
        with moe_ops.batch_invariant(False):
            for _ in range(8):
                layer(x)
            assert moe_ops.packed_weight_bytes(layer) > 0
        assert_identical(layer(x), before)
        moe_ops.pack_weights(layer)
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("bits", ["int8", "int4 g64"])
def test_training_through_quantized_experts(bits, dtype):
    """Values and gradients of x, which are other products than those of inference."""
    weights = [
        t
        for shape in ((4, 128, 128), (4, 128, 64))
        for t in quantize_weight(torch.randn(shape), bits)
    ]
    x, routing = torch.randn(513, 128).to(dtype), torch.rand(513, 2)
    ids = torch.randint(4, (513, 2))

    def run(count: int) -> tuple[Tensor, Tensor]:
        tokens = x[:count].clone().requires_grad_()
        y = moe_ops.moe_ffn_quantized(tokens, *weights, routing[:count], ids[:count], format=bits)
        y.float().square().sum().backward()
        return y.detach(), tokens.grad

    whole = run(513)
    for count in (1, 7, 64):
        assert all(torch.equal(a, b[:count]) for a, b in zip(run(count), whole, strict=True))
