"""moe_ffn_quantized in fp64: its weights, and the integers that it makes of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tests.helpers.ffn import ffn_operands, moe_ffn_magnitude
from tests.helpers.routing import Routing
from torch import Tensor

from moe_ops import _library, is_batch_invariant_enabled, ops, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.quant import (
    Fp8WeightConfig,
    Int4WeightConfig,
    Int8WeightConfig,
    WeightConfig,
    quantize_fp8_blocks,
)
from moe_ops.reference._codes import dequantized as dequantized_weight
from moe_ops.reference._codes import formats_of
from moe_ops.reference.gated_act import plain_act
from moe_ops.testing import (
    Kwargs,
    absolute,
    assert_close_by_norm,
    check_against_reference,
    eps,
    poisoned,
    widened,
)
from moe_ops.weight_formats import WeightFormat

# Most tokens of an expert whose products are of integers whatever their dtype (moe_ffn_quantized).
INTEGER_ROWS = 8


def label_of(bits: int, group: int = 32) -> str:
    """Returns the name of the format of `quantized`."""
    return "int8" if bits == 8 else f"int4 g{group}"


def weight_config(format: str | None, group_size: int | None = None) -> WeightConfig | None:
    """Returns the config of "int8", "int4" with a group size (None: 64), or "fp8"; None of None."""
    if format is None:
        return None
    if format == "int4":
        return Int4WeightConfig(group_size or 64)
    return {"int8": Int8WeightConfig, "fp8": Fp8WeightConfig}[format]()


def token_bits(weight: Tensor, format: str, dtype: torch.dtype, counts: Tensor) -> Tensor:
    """Returns the bits of the integers that moe_ffn_quantized makes of the tokens of experts with
    `counts` of them: 8, 16, or 0 where they stay as they are. x has this dtype, `weight` is one of
    the codes."""
    level, how = _library.cpu_isa(), WeightFormat.from_label(format)
    if how.name not in ("int8", "int4", "mxfp4", "nvfp4"):
        return torch.zeros_like(counts)
    bits = torch.full_like(counts, 16 if how.name == "int8" else 8)
    if is_batch_invariant_enabled():
        return bits * how.has_kernels
    if how.name == "nvfp4":
        bits[counts > INTEGER_ROWS] = 0
    elif dtype == torch.float32 or level == "portable":
        # Integers of 8 bits, and others of what they leave.
        bits[counts > INTEGER_ROWS] = 16 if how.name != "int8" and level != "portable" else 0
    elif how.name == "int8" and level in ("avx512_bf16", "amx"):  # those with VNNI
        bits[counts > min(max(weight.shape[2] // 160, 3), 6)] = 8
    return bits


def slots_of_experts(call: Kwargs) -> Tensor:
    """Returns how many slots of an ffn call each expert has."""
    ids, experts = call["topk_ids"].flatten().long(), call["w_down"].shape[0]
    return torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)


def bits_of_tokens(call: Kwargs) -> set[int]:
    """Returns the bits of the integers that moe_ffn_quantized makes of tokens (token_bits)."""
    rows, formats = slots_of_experts(call), formats_of(call["format"], 2)
    rows, dtype = rows[rows > 0], call["x"].dtype
    weights = zip((call["w_gate_up"], call["w_down"]), formats, strict=True)
    return {b for w, how in weights for b in token_bits(w, how, dtype, rows).tolist()}


def rounds_to_bytes(call: Kwargs) -> bool:
    return 8 in bits_of_tokens(call)


def quantized(w: Tensor, bits: int, group: int = 32) -> tuple[Tensor, Tensor]:
    """Codes and scales of w [E, O, D] as moe_ffn_quantized takes them, rounded to nearest."""
    w = w.float()
    if bits == 8:
        scale = w.abs().amax(2) / 127 if w.shape[2] else w.new_zeros(w.shape[:2])
        codes = (w / scale.clamp_min(1e-30)[:, :, None]).round().clamp(-127, 127)
        return codes.to(torch.int8), scale
    experts, features, depth = w.shape
    groups = w.reshape(experts, features, depth // group, group)
    scale = groups.abs().amax(3) / 7 if depth else w.new_zeros(experts, features, 0)
    codes = (groups / scale.clamp_min(1e-30)[..., None]).round().clamp(-8, 7) + 8
    pairs = codes.to(torch.uint8).view(experts, features, depth // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale


def quantized_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    bits: int,
    group: int = 32,
    *,
    x_scale: bool = False,
    **options: Any,
) -> Kwargs:
    """ffn_operands with quantized weights."""
    call = ffn_operands(routing, hidden_size, intermediate_size, dtype, **options)
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantized(call[name], bits, group)
    call["format"] = label_of(bits, group)
    if x_scale:
        call["x_scale"] = torch.rand(hidden_size) + 0.5
    return call


def dequantized(call: Kwargs) -> Kwargs:
    """The moe_ffn call in fp64 that a moe_ffn_quantized call stands for."""
    exact = widened({name: v for name, v in call.items() if not name.startswith("w_")})
    formats = formats_of(exact.pop("format"), 2)
    for name, format in zip(("w_gate_up", "w_down"), formats, strict=True):
        parts = (call[name], call[f"{name}_scale"], call.get(f"{name}_zero"))
        exact[name] = dequantized_weight(*parts, format=format, dtype=torch.float64)
    factors = exact.pop("x_scale", None)
    if factors is not None:
        exact["x"] = exact["x"] * factors
    return exact


def weight_bound(w: Tensor, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:
    """Returns in fp64 a bound on what the terms of a weight amount to. A weight may be the
    difference of a value and an offset, which may be larger than what they add up to: a weight of
    zero point 15 and code 15 is 7 * scale - 7 * scale."""
    bound = dequantized_weight(w, scale, zero, format=format, dtype=torch.float64).abs()
    if zero is not None or format == "q4_k":
        codes_of_zero = torch.full_like(w, 0x88 if zero is not None else 0)
        offset = dequantized_weight(codes_of_zero, scale, zero, format=format, dtype=torch.float64)
        bound += 2 * offset.abs()
    return bound


def moe_ffn_quantized_magnitude(**call: Any) -> Tensor:
    """moe_ffn_magnitude of the weights that codes and scales stand for."""
    exact = absolute(dequantized(call))
    formats = formats_of(call["format"], 2)
    for name, format in zip(("w_gate_up", "w_down"), formats, strict=True):
        parts = (call[name], call[f"{name}_scale"], call.get(f"{name}_zero"))
        exact[name] = weight_bound(*parts, format)
    return moe_ffn_magnitude(**exact)


def check_moe_ffn_quantized(call: Kwargs) -> None:
    """moe_ffn_quantized on CUDA, where tokens stay as they are, against its reference. Half types
    may round x times x_scale, the activation and an expert's output, which `steps` allows."""
    depth = call["w_down"].shape[-1] * (2 if call["w_down"].dtype == torch.uint8 else 1)
    check_against_reference(
        ops.moe_ffn_quantized,
        reference.moe_ffn_quantized,
        call,
        magnitude=moe_ffn_quantized_magnitude,
        sum_length=max(1, *call["x"].shape, depth, call["topk_ids"].numel()),
        steps=2 if call.get("x_scale") is None else 3,
    )


def integer_tokens(rows: Tensor) -> Tensor:
    """Each row [N, D] as moe_ffn_quantized rounds it to 8 bits: 255 values in every 32 of its
    columns."""
    depth = rows.shape[1]
    padded = torch.nn.functional.pad(rows.float(), (0, -depth % 32))
    blocks = padded.unflatten(1, ((depth + 31) // 32, 32))
    if blocks.numel() == 0:
        return rows
    most = blocks.abs().amax(2, keepdim=True)
    # In fp64 the product is exact, as it is in the fused multiply-add that rounds it to an integer.
    # Where there is none, a product just beside half an integer may be rounded to that first.
    inverse = torch.full_like(most, 127) / most  # 127 / most would round twice.
    codes = (blocks.double() * inverse).round().nan_to_num(0)
    return (codes * (most / 127)).flatten(1)[:, :depth]


def moe_ffn_in_integers(call: Kwargs) -> Tensor:
    """moe_ffn_quantized in fp64 with tokens rounded to 8 bits where it does that. Those that become
    16 bits are not rounded here: that is at most 1.5e-5 of the largest of a row."""
    exact = dequantized(call)
    on_input = exact.get("apply_router_weight_on_input", False)
    activation, interleaved = exact["activation"], exact.get("interleaved", False)
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(
        exact["topk_ids"], exact["w_gate_up"].shape[0]
    )
    rows = reference.permute(exact["x"], offsets, row_to_slot)
    if on_input:
        rows = rows * exact["topk_weights"].reshape(-1)[row_to_slot.long()][:, None]
    counts = offsets.diff().long()

    formats = formats_of(call["format"], 2)

    def rounded(rows: Tensor, weight: Tensor, format: str) -> Tensor:
        bytes_of = token_bits(weight, format, call["x"].dtype, counts) == 8
        bytes_of = bytes_of.repeat_interleave(counts)[:, None]
        used = rows[: len(bytes_of)]
        return torch.cat([torch.where(bytes_of, integer_tokens(used), used), rows[len(used) :]])

    rows = rounded(rows, call["w_gate_up"], formats[0])
    preact = reference.grouped_gemm(rows, exact["w_gate_up"], offsets, bias=exact.get("b_gate_up"))
    if activation in GATED_ACTIVATIONS:
        options = {k: exact[k] for k in ("alpha", "limit") if k in exact}
        h = reference.gated_act(preact, activation, interleaved=interleaved, **options)
    else:
        h = plain_act(preact, activation)
    h = rounded(h, call["w_down"], formats[1])
    out = reference.grouped_gemm(h, exact["w_down"], offsets, bias=exact.get("b_down"))
    return reference.unpermute(
        out, offsets, slot_to_row, None if on_input else exact["topk_weights"]
    )


def quantized_gemm_operands(
    counts: Sequence[int],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    bits: int,
    group: int = 32,
    *,
    tail: int = 0,
    bias: bool = False,
) -> Kwargs:
    """The tensors of a grouped_gemm_quantized call."""
    weights = torch.randn(len(counts), out_features, in_features) / max(in_features, 1) ** 0.5
    b, b_scale = quantized(weights, bits, group)
    call: Kwargs = {
        "a": torch.randn(sum(counts) + tail, in_features).to(dtype),
        "b": b,
        "b_scale": b_scale,
        "expert_offsets": torch.tensor([0, *counts]).cumsum(0).int(),
        "format": label_of(bits, group),
    }
    if bias:
        call["bias"] = torch.randn(len(counts), out_features).to(dtype)
    return call


def check_grouped_gemm_quantized(call: Kwargs) -> None:
    """Against its reference in fp64 with rows rounded to 8 bits where the CPU does that."""
    counts = call["expert_offsets"].diff().long()
    exact = {**widened(call), "b": call["b"]}
    dtype = call["a"].dtype
    bits = token_bits(call["b"], call["format"], dtype, counts)
    on_cpu = call["a"].device.type == "cpu" and _library.cpu_isa() != ""
    used = int(counts.sum())
    if on_cpu:
        in_bytes = (bits == 8).repeat_interleave(counts)[:, None]
        rows = exact["a"][:used]
        rows = torch.where(in_bytes, integer_tokens(rows), rows)
        exact["a"] = torch.cat([rows, exact["a"][used:]])
    expected = reference.grouped_gemm_quantized(**exact)
    with poisoned(expected.to(dtype)):
        y = ops.grouped_gemm_quantized(**call)
    assert y.dtype == dtype and y.shape == expected.shape
    assert not y[used:].any()
    # As of moe_ffn_quantized: a number beside half an integer may become either.
    slack = 5e-3 if _library.cpu_isa() == "portable" else 1e-3
    slack = slack if bool((bits[counts > 0] == 8).any()) else 1e-4
    error, norm = (y.double() - expected).norm(), expected.norm()
    # Rounding to 16 bits moves numbers by up to half a step of 1/32767 of the largest of a row, and
    # a sum that cancels by as much as any other: by 0.3 steps times the norm of the weights.
    in_words = (bits == 16).repeat_interleave(counts)
    steps = exact["a"][:used].abs().amax(1, keepdim=True) * in_words[:, None] / 32767
    parts = (call["b"], call["b_scale"], call.get("b_zero"))
    weights = dequantized_weight(*parts, format=call["format"], dtype=torch.float64)
    squares = steps.square().expand(used, weights.shape[2])
    moved = reference.grouped_gemm(squares, weights.square(), call["expert_offsets"]).sqrt()
    assert error <= (eps(dtype) + slack) * norm + moved.norm() + 1e-30, f"{error:.2e} of {norm:.2e}"


def check_grouped_gemm_quantized_on_device(call: Kwargs) -> None:
    """Computes the result on CUDA, where the weights become numbers of a's dtype: each product of a
    and a weight is off by half an ulp of the weight, the result by half of its own."""
    exact = {**widened(call), "b": call["b"]}
    expected = reference.grouped_gemm_quantized(**exact)
    sizes = {name: exact[name].abs() for name in ("a", "bias") if name in exact}
    parts = (call["b"], call["b_scale"], call.get("b_zero"))
    weights = dequantized_weight(*parts, format=call["format"], dtype=torch.float64)
    codes = {"b": weights.abs()}
    offsets = {"expert_offsets": call["expert_offsets"]}
    magnitude = reference.grouped_gemm(**sizes, **codes, **offsets)
    with poisoned(expected.to(call["a"].dtype)):
        y = ops.grouped_gemm_quantized(**call)
    assert y.dtype == call["a"].dtype and y.shape == expected.shape
    error = (y.double() - expected).norm()
    assert error <= 2 * eps(y.dtype) * magnitude.norm() + 1e-30, f"{error:.2e}"


# --- formats of published checkpoints

# Integers in groups: bits, group, dtype of the scales, whether there are zero points.
STORED_GROUPS = {
    "int8 g32 float16": (8, 32, torch.float16, False),
    "int8 g64": (8, 64, torch.float32, False),
    "int8 g160 bfloat16": (8, 160, torch.bfloat16, False),
    "int4 g64 bfloat16 zero": (4, 64, torch.bfloat16, True),
    "int4 g32 float16": (4, 32, torch.float16, False),
    "int4 g96 zero": (4, 96, torch.float32, True),
    "int4 g256": (4, 256, torch.float32, False),
}
# Others: what the length of a row is a multiple of.
STORED_RECORDS = {
    "mxfp4": 32,
    "fp8": 1,
    "e4m3": 1,
    "e4m3 g32 bfloat16": 32,
    "q4_k": 256,
    "q6_k": 256,
    "nvfp4": 16,
}
STORED = (
    *("int8 g32 float16", "int8 g64", "int4 g64 bfloat16 zero", "int4 g32 float16"),
    *STORED_RECORDS,
)


def stored(
    kind: str, experts: int, features: int, depth: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points at random of a format of STORED_GROUPS or STORED_RECORDS; of
    weights of about depth^-0.5."""
    size = depth**-0.5

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, (experts, features, *shape), dtype=torch.uint8)

    if kind in STORED_GROUPS:
        bits, group, dtype, has_zero = STORED_GROUPS[kind]
        groups = (experts, features, depth // group)
        scale = ((torch.rand(groups) + 0.5) * size / (64 if bits == 8 else 4)).to(dtype)
        zero = torch.randint(0, 16, groups, dtype=torch.uint8) if has_zero else None
        return (codes(depth).view(torch.int8) if bits == 8 else codes(depth // 2)), scale, zero
    if kind == "mxfp4":
        exponents = torch.randint(121, 124, (experts, features, depth // 32), dtype=torch.uint8)
        return codes(depth // 2), exponents, None
    if kind == "nvfp4":
        steps = (torch.rand(experts, features, depth // 16) * 440 + 1).to(torch.float8_e4m3fn)
        factor = (torch.rand(experts, features, 1) + 0.5) * size / 448
        head = factor.flatten().view(torch.uint8).view(experts, features, 4)
        parts = (head, steps.view(torch.uint8))
        return codes(depth // 2), torch.cat(parts, -1), None
    if kind.startswith("e4m3"):
        numbers = torch.randn(experts, features, depth).mul_(100).clamp_(-448, 448)
        numbers = numbers.to(torch.float8_e4m3fn)
        # A scale per row, or one in bfloat16 per 32 inputs.
        groups = (depth // 32,) if "g32" in kind else ()
        scale = (torch.rand(experts, features, *groups) + 0.5) * size / 100
        return numbers, scale.to(torch.bfloat16 if groups else torch.float32), None
    if kind == "fp8":
        return *quantize_fp8_blocks(torch.randn(experts, features, depth) * size), None
    record = codes(depth // 256, {"q4_k": 16, "q6_k": 18}[kind])
    steps, at = (2, 0) if kind == "q4_k" else (1, 16)
    step = (torch.rand(experts, features, depth // 256, steps) + 0.5) * size / 1024
    record[..., at : at + 2 * steps] = step.half().view(torch.uint8)
    return codes(depth // 2 if kind == "q4_k" else 3 * depth // 4), record, None


def any_format(kind: str, experts: int, features: int, depth: int) -> dict[str, Tensor]:
    """The parts of a weight, by what is behind its name: those of `stored`, or of "float32",
    "int8", "int4 g64" and its like."""
    if kind in STORED_GROUPS or kind in STORED_RECORDS:
        parts = stored(kind, experts, features, depth)
    else:
        w = torch.randn(experts, features, depth) * depth**-0.5
        if kind == "float32":
            return {"": w}
        bits, _, group = kind.removeprefix("int").partition(" g")
        parts = (*quantized(w, int(bits), int(group or 0)), None)
    names = ("", "_scale", "_zero")
    return {name: t for name, t in zip(names, parts, strict=True) if t is not None}


def stored_call(
    kind: str,
    routing: Routing,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    **options: Any,
) -> Kwargs:
    """moe_ffn_quantized with weights of such a format."""
    call = quantized_operands(routing, hidden, intermediate, dtype, 8, **options)
    for name in ("w_gate_up", "w_down"):
        parts = any_format(kind, *call[name].shape)
        call |= {f"{name}{part}": value for part, value in parts.items()}
    return call | {"format": kind}


def stored_gemm_call(
    kind: str, counts: Sequence[int], in_features: int, out_features: int, dtype: torch.dtype
) -> Kwargs:
    """grouped_gemm_quantized with a weight of such a format, a bias and two rows of no expert."""
    call = quantized_gemm_operands(counts, in_features, out_features, dtype, 8, tail=2, bias=True)
    parts = any_format(kind, *call["b"].shape)
    return call | {f"b{part}": value for part, value in parts.items()} | {"format": kind}


def check_stored_gemm(call: Kwargs, wrt: Sequence[str] = ()) -> None:
    """Checks a call against its reference in fp64."""
    counts = call["expert_offsets"].diff().long()
    bits = token_bits(call["b"], call["format"], call["a"].dtype, counts[counts > 0])
    if call["a"].device.type == "cpu" and bool((bits > 0).any()):
        check_grouped_gemm_quantized(call)
        if not wrt:
            return
        # Where a gradient is wanted, rows are not rounded.
    check_unrounded_gemm(call, wrt)


def check_unrounded_gemm(call: Kwargs, wrt: Sequence[str] = ()) -> None:
    """Checks a call that does not round rows. The bound is that of the sums, with weights of
    `weight_bound`."""
    names = {"b", "b_scale", "b_zero", "format"}
    codes = {name: v for name, v in call.items() if name in names}
    bound = weight_bound(codes["b"], codes["b_scale"], codes.get("b_zero"), codes["format"])
    check_against_reference(
        functools.partial(ops.grouped_gemm_quantized, **codes),
        functools.partial(reference.grouped_gemm_quantized, **codes),
        {name: v for name, v in call.items() if name not in codes},
        wrt,
        magnitude=functools.partial(reference.grouped_gemm, b=bound),
        sum_length=max(*call["a"].shape, *bound.shape[1:]),
    )


def check_stored_ffn(call: Kwargs) -> None:
    """moe_ffn_quantized with such weights against moe_ffn in fp64 with those that they stand for.
    x times x_scale, the activated features and, on CUDA, an expert's output are rounded to x's
    type."""
    exact = dequantized(call)
    on_cpu = call["x"].device.type == "cpu"
    rounds = on_cpu and bits_of_tokens(call) != {0}
    expected = moe_ffn_in_integers(call) if rounds else reference.moe_ffn(**exact)
    with poisoned(call["x"], expected.to(call["x"].dtype)):
        y = ops.moe_ffn_quantized(**call)
    assert y.dtype == call["x"].dtype
    if rounds:
        error, norm = (y.double() - expected).norm(), expected.norm()
        slack = 5e-3 if _library.cpu_isa() == "portable" else 1e-3
        assert error <= (2 * eps(y.dtype) + slack) * norm, f"{error:.2e} of {norm:.2e}"
        return
    assert_close_by_norm(
        y,
        expected,
        moe_ffn_magnitude(**absolute(exact)),
        sum_length=max(*exact["x"].shape, exact["w_down"].shape[-1], 1),
        steps=0 if y.dtype == torch.float32 and on_cpu else 4,
    )
