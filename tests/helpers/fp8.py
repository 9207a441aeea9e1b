"""Operands of the fp8 ops, and checks against their references in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.helpers.ffn import activation_magnitude, ffn_operands
from tests.helpers.routing import Routing
from torch import Tensor

from moe_ops import ops, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.quant import quantize_fp8_blocks
from moe_ops.reference.gated_act import plain_act
from moe_ops.testing import (
    Kwargs,
    absolute,
    assert_close_by_norm,
    assert_same_places,
    eps,
    poisoned,
    widened,
)


def fp8_gemm_operands(
    counts: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    tail: int = 0,
    bias: torch.dtype | None = None,
) -> Kwargs:
    """The tensors of a grouped_gemm_fp8 call whose blocks differ in size by up to 1e4."""
    e, n = len(counts), sum(counts) + tail

    def spread(*size: int) -> Tensor:
        return torch.randn(size) * 10 ** (4 * torch.rand(size[0], *[1] * (len(size) - 1)) - 2)

    a, a_scale = reference.quantize_fp8(spread(n, in_features))
    b, b_scale = quantize_fp8_blocks(spread(e, out_features, in_features))
    # Neighboring blocks would otherwise have nearly the same scale.
    a_scale = a_scale * 2 ** (2 * torch.rand(a_scale.shape))
    b_scale = b_scale * 2 ** (2 * torch.rand(b_scale.shape))
    call: Kwargs = {
        "a": a,
        "a_scale": a_scale,
        "b": b,
        "b_scale": b_scale,
        "expert_offsets": torch.tensor([0, *counts]).cumsum(0).int(),
    }
    if bias is not None:
        call["bias"] = torch.randn(e, out_features).to(bias)
    return call


def check_grouped_gemm_fp8(call: Kwargs, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Against the fp64 reference on the same codes and scales, in poisoned memory: what is left is
    the rounding of fp32 sums. Returns the output."""
    wide = {**widened(call), "out_dtype": torch.float64}
    expected = reference.grouped_gemm_fp8(**wide)
    magnitude = reference.grouped_gemm_fp8(**{**absolute(call), "out_dtype": torch.float64})
    with poisoned(expected.to(out_dtype)):
        out = ops.grouped_gemm_fp8(**call, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_close_by_norm(out, expected, magnitude, sum_length=max(1, call["a"].shape[1]))
    return out


def fp8_wgrad_operands(
    counts: Sequence[int], out_features: int, in_features: int, *, tail: int = 0
) -> Kwargs:
    """The tensors of a grouped_gemm_fp8_wgrad call whose columns differ in size by up to 1e4."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    call: Kwargs = {}
    for name, features in (("grad", out_features), ("a", in_features)):
        x = torch.randn(sum(counts) + tail, features) * 10 ** (4 * torch.rand(features) - 2)
        call[name], scale = reference.quantize_fp8_columns(x, offsets)
        # Neighboring groups would otherwise have nearly the same scale.
        call[f"{name}_scale"] = scale * 2 ** (2 * torch.rand(scale.shape))
    return {**call, "expert_offsets": offsets}


def check_grouped_gemm_fp8_wgrad(call: Kwargs, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Checks grouped_gemm_fp8_wgrad as check_grouped_gemm_fp8 does its op."""
    expected = reference.grouped_gemm_fp8_wgrad(**widened(call), out_dtype=torch.float64)
    magnitude = reference.grouped_gemm_fp8_wgrad(**absolute(call), out_dtype=torch.float64)
    with poisoned(expected.to(out_dtype)):
        out = ops.grouped_gemm_fp8_wgrad(**call, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    longest = max(1, int(call["expert_offsets"].diff().max()))
    assert_close_by_norm(out, expected, magnitude, sum_length=longest)
    return out


def fp8_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    **options: Any,
) -> Kwargs:
    """ffn_operands with weights in e4m3."""
    call = ffn_operands(routing, hidden_size, intermediate_size, dtype, **options)
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantize_fp8_blocks(call[name])
    return call


def check_moe_ffn_fp8(call: Kwargs, *, row_steps: int = 0) -> Tensor:
    """moe_ffn_fp8 against its fp64 reference; returns the output.

    Both round x to the same codes. An activated feature that lies within rounding of the middle
    between two codes may become either: what that is worth is bounded feature by feature, and
    everything else as rounding of fp32 sums.

    row_steps: roundings to x's dtype between the down projection and the sum over experts.
    """
    expected, bound = moe_ffn_fp8_bound(call, row_steps)
    with poisoned(call["x"], expected.to(call["x"].dtype)):
        y = ops.moe_ffn_fp8(**call)
    assert y.dtype == call["x"].dtype
    assert y.shape == expected.shape
    assert_same_places(y.isnan(), expected.isnan(), y.double(), expected, "NaN")
    finite = expected.isfinite()
    error = torch.where(finite, (y.double() - expected).abs(), 0)
    bound = torch.where(finite, bound, 0)
    assert bool((error <= bound).all()), (
        f"{int((error > bound).sum())} of {error.numel()} elements out of bound; the worst is "
        f"{(error / bound).max().item():.2f} times its bound"
    )
    if error.numel() >= 256:
        # Single features that take another code are rare, and most of the bound is theirs.
        norm = torch.where(finite, expected, 0).norm()
        slack = (1 + row_steps) * eps(y.dtype) + 1e-3
        assert error.norm() <= slack * norm, f"{error.norm() / norm:.2e} of the norm"
    return y


def moe_ffn_fp8_bound(call: Kwargs, row_steps: int = 0) -> tuple[Tensor, Tensor]:
    """The reference in fp64 and what an output may differ from it (check_moe_ffn_fp8)."""
    wide = widened(call)
    x, ids, weights = wide["x"], wide["topk_ids"], wide["topk_weights"]
    experts, dtype = wide["w_gate_up"].shape[0], call["x"].dtype
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(ids, experts)
    end = int(offsets[-1])
    slot = row_to_slot[:end].long()
    on_input = wide.get("apply_router_weight_on_input", False)

    def product(q: Tensor, scale: Tensor, name: str, sign: bool) -> Tensor:
        operands = {"a": q, "a_scale": scale, "b": wide[name], "b_scale": wide[f"{name}_scale"]}
        if (bias := wide.get("b" + name[1:])) is not None:
            operands["bias"] = bias
        return reference.grouped_gemm_fp8(
            **(widened if sign else absolute)(operands),
            expert_offsets=offsets,
            out_dtype=torch.float64,
        )

    def rounding(length: int) -> float:
        return 0.5 * eps(torch.float32) * (12 + 4 * length**0.5)

    codes, scale = reference.quantize_fp8(x)
    rows, scale = codes[slot // max(ids.shape[1], 1)], scale.double()[slot // max(ids.shape[1], 1)]
    if on_input:
        scale = scale * weights.reshape(-1)[slot, None]
    preact = product(rows, scale, "w_gate_up", True).requires_grad_()
    preact_error = rounding(x.shape[1]) * product(rows, scale, "w_gate_up", False)
    activation, interleaved = wide["activation"], wide.get("interleaved", False)
    options = {k: wide[k] for k in ("alpha", "limit") if k in wide}
    if activation in GATED_ACTIVATIONS:
        h = reference.gated_act(preact, activation, interleaved=interleaved, **options)
    else:
        h = plain_act(preact, activation)
    slope = torch.autograd.grad(h.sum(), preact)[0].abs() * preact_error
    h, preact = h.detach(), preact.detach()
    if activation in GATED_ACTIVATIONS:
        halves = (slope[:, 0::2], slope[:, 1::2]) if interleaved else slope.chunk(2, 1)
        slope = halves[0] + halves[1]
    # Curvature, and the activation's own rounding.
    magnitude = activation_magnitude(preact.abs(), activation, interleaved)
    h_error = 2 * slope + 16 * eps(torch.float32) * (h.abs() + magnitude)

    h_codes, h_scale = reference.quantize_fp8(h)
    factors = h_scale.double().repeat_interleave(128, 1)[:, : h.shape[1]]
    value = h.abs() / factors
    step = 2.0 ** (value.clamp(min=2.0**-6).log2().floor() - 3)
    from_middle = ((value / step).frac() - 0.5).abs() * step
    # The scale moves with the largest of a block.
    blocks = torch.nn.functional.pad(h_error, (0, -h.shape[1] % 128)).unflatten(1, (-1, 128))
    block_error = blocks.amax(2).repeat_interleave(128, 1)[:, : h.shape[1]]
    moved = h_error / factors + value * (block_error / (448 * factors) + 4 * eps(torch.float32))
    code_error = torch.where(from_middle <= moved, step * factors, 0) + 2 * moved * factors
    ones = torch.ones(code_error.shape[0], h_scale.shape[1], dtype=torch.float64)
    down = (wide["w_down"].abs(), wide["w_down_scale"])
    out_error = reference.grouped_gemm_fp8(
        code_error, ones, *down, offsets, out_dtype=torch.float64
    )
    out = product(h_codes, h_scale, "w_down", True)
    out_error = out_error + rounding(h.shape[1]) * product(h_codes, h_scale, "w_down", False)
    out_error = out_error + 0.51 * row_steps * eps(dtype) * out.abs()
    combine = None if on_input else weights.abs()
    tail = (0, 0, 0, ids.numel() - end)
    out_error, out = (torch.nn.functional.pad(t, tail) for t in (out_error, out.abs()))
    bound = reference.unpermute(out_error, offsets, slot_to_row, combine)
    sums = reference.unpermute(out, offsets, slot_to_row, combine)
    expected = reference.moe_ffn_fp8(**wide)
    bound = 1.01 * bound + rounding(ids.shape[1]) * sums + 0.51 * eps(dtype) * expected.abs()
    return expected, bound + 2.0**-24


def fp8_ffn_steps(call: Kwargs, grad_y: Tensor) -> tuple[Tensor, Kwargs]:
    """The output and the gradients of fp8_ffn, step by step as documented, with sums in fp64."""
    x, topk_weights, ids = call["x"], call["topk_weights"].double(), call["topk_ids"]
    dtype, num_experts = x.dtype, call["w_gate_up"].shape[0]
    on_input = call.get("apply_router_weight_on_input", False)
    interleaved, activation = call.get("interleaved", False), call["activation"]
    options = {k: call[k] for k in ("alpha", "limit") if k in call}
    up, down = (quantize_fp8_blocks(call[n]) for n in ("w_gate_up", "w_down"))
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(ids, num_experts)
    slot, end = row_to_slot.long(), int(offsets[-1])
    token = slot // max(ids.shape[1], 1)
    weight = torch.where(torch.arange(len(slot)) < end, topk_weights.flatten()[slot], 0)[:, None]

    def product(q, scale, w, bias=None, turned=False):
        if turned:
            w = (w[0].mT, w[1].mT)
        bias = None if bias is None else bias.double()
        return reference.grouped_gemm_fp8(
            q, scale.double(), w[0], w[1].double(), offsets, bias=bias, out_dtype=torch.float64
        ).to(dtype)

    def of_tokens(t):
        q, scale = reference.quantize_fp8(t)
        return q[token], scale[token].double()

    def act(t):
        if activation in GATED_ACTIVATIONS:
            return reference.gated_act(t, activation, interleaved=interleaved, **options)
        return plain_act(t, activation)

    def weight_gradient(grad, rows):
        (g, gs), (a, a_scale) = (
            reference.quantize_fp8_columns(t.float(), offsets) for t in (grad, rows)
        )
        return reference.grouped_gemm_fp8_wgrad(g, gs.double(), a, a_scale.double(), offsets)

    q, scale = of_tokens(x)
    preact = product(q, scale * weight if on_input else scale, up, call.get("b_gate_up"))
    h = act(preact)
    out = product(*reference.quantize_fp8(h), down, call.get("b_down"))
    y = reference.unpermute(
        out.double(), offsets, slot_to_row, None if on_input else topk_weights
    ).to(dtype)

    grad_h = product(*of_tokens(grad_y), down, turned=True).double()
    rows_y = grad_y[token].double() * (1 if on_input else weight)
    grads = {"w_down": weight_gradient(rows_y.float(), h)}
    dots = (h.double() * grad_h).sum(1)
    if not on_input:
        if "b_down" in call:
            expert = torch.bucketize(torch.arange(len(slot)), offsets[1:], right=True)
            bias = call["b_down"].double()[expert.clamp(max=num_experts - 1)]
            here = torch.arange(len(slot)) < end
            dots = dots + torch.where(here, (bias * grad_y[token].double()).sum(1), 0)
    wide = preact.double().requires_grad_()
    (grad_preact,) = torch.autograd.grad(act(wide), wide, grad_h.to(dtype).double())
    grad_preact = grad_preact.to(dtype)
    # The routing weights multiply scales, or what is rounded in columns.
    rows_x = x[token].float() * (weight.float() if on_input else 1)
    rows_preact = grad_preact.float() * (1 if on_input else weight.float())
    grads["w_gate_up"] = weight_gradient(rows_preact, rows_x)
    q, scale = reference.quantize_fp8(grad_preact)
    grad_rows = product(q, scale if on_input else scale * weight, up, turned=True).double()
    if on_input:
        dots = (x[token].double() * grad_rows).sum(1)
        grad_rows = (grad_rows * weight).to(dtype).double()
    grads["x"] = torch.zeros(x.shape, dtype=torch.float64).index_add(0, token, grad_rows)
    grads["topk_weights"] = dots[slot_to_row.long()]
    if "b_gate_up" in call:
        grads["b_gate_up"] = reference.grouped_sum(rows_preact.double(), offsets)
    if "b_down" in call:
        grads["b_down"] = reference.grouped_sum(rows_y, offsets)
    return y, grads
