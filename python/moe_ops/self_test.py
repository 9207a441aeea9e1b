"""Self-test of every op on small random inputs against the reference, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops import _private_torch, ops, reference
from moe_ops.ops._checks import accumulate_dtype
from moe_ops.quant import quantize_fp8_blocks

# Relative error (Frobenius norm) against the reference in fp64. Both are several times the rounding
# error at the sizes of the self-test and far below the error of a wrong formula.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class SelfTest:
    """Result of one op on small random inputs against the reference; errors are relative, None if
    not applicable."""

    op: str
    device: str
    dtype: str
    passed: bool
    forward_error: float | None
    backward_error: float | None
    tolerance: float
    seconds: float
    message: str | None = None


@dataclass(frozen=True)
class Case:
    """A call of an op.

    call: (module, *tensors) -> outputs, where the module is `moe_ops.ops` or `moe_ops.reference`.
    tensors: floating-point ones are converted to the dtype of the test, and get gradients if the op
    is differentiable.
    tolerance: minimum tolerance, for ops that round more than their dtype.
    """

    op: str
    call: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    differentiable: bool = True
    tolerance: float = 0.0


def self_test(device: str = "cpu") -> list[SelfTest]:
    """Tests every op with a kernel for the device against the reference on the CPU, forward and
    backward, in fp32; moe_ffn also in bf16, on CUDA also the GEMMs."""
    here = [case for case in cases() if device == "cpu" or has_kernel(case.op, device)]
    in_bf16 = ("moe_ffn",) if device == "cpu" else ("moe_ffn", "grouped_gemm", "grouped_gemm_wgrad")
    return [_run_case(case, device, torch.float32) for case in here] + [
        _run_case(case, device, torch.bfloat16) for case in here if case.op in in_bf16
    ]


def has_kernel(op: str, device: str) -> bool:
    """Returns whether this build registers a kernel of the op for cpu or cuda."""
    if not hasattr(torch.ops.moe_ops, op):
        return False
    return _private_torch.has_kernel(f"moe_ops::{op}", torch.device(device).type)


def cases() -> list[Case]:
    """Returns small inputs with an idle expert and empty slots."""
    T, H, I, E, K = 33, 64, 40, 5, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Distinct and evenly spaced, so that rounding cannot change the selected experts.
    logits = torch.randperm(T * E, generator=generator).view(T, E) * (8.0 / (T * E)) - 4.0
    ids = torch.randint(0, E - 1, (T, K), generator=generator, dtype=torch.int32)
    ids[3, 1] = -1
    weights = torch.rand(T, K, generator=generator)
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(ids, E)
    w_gate_up, w_down = normal(E, 2 * I, H) / H**0.5, normal(E, H, I) / I**0.5
    x, rows = normal(T, H), normal(T * K, H)
    layer = (x, w_gate_up, w_down, weights, ids, normal(E, 2 * I), normal(E, H))
    attention = (normal(1, T, K, 3, 24), normal(1, T + 4, 3, 24), normal(1, T + 4, 3, 24))
    mixed = (normal(T, E, I), normal(T, 3, E), normal(E, I), normal(E, I))
    dense = (normal(T, 2, H), w_gate_up[:, :I], w_down, torch.arange(E) % 2)
    return [
        Case("topk_router", lambda m, t: m.topk_router(t, K, renormalize=True), (logits,)),
        Case("topp_router", lambda m, t: m.topp_router(t, 0.7, E), (logits,)),
        Case("expert_choice_router", lambda m, t: m.expert_choice_router(t, 9), (logits,)),
        Case("router_linear", lambda m, *t: m.router_linear(*t), (x, normal(E, H), normal(E))),
        Case("sort_by_expert", lambda m, t: m.sort_by_expert(t, E), (ids,), False),
        Case("dispatch_layout", lambda m, t: m.dispatch_layout(t, 3, 2), (ids,), False),
        Case("permute", lambda m, *t: m.permute(*t), (x, offsets, row_to_slot)),
        Case("unpermute", lambda m, *t: m.unpermute(*t), (rows, offsets, slot_to_row, weights)),
        Case("gated_act", lambda m, t: m.gated_act(t, "swiglu"), (normal(T, 2 * I),)),
        Case(
            "add_rms_norm",
            lambda m, *t: m.add_rms_norm(*t[:3], bias=t[3]),
            (x, normal(H), normal(T, H), normal(H)),
        ),
        Case("grouped_gemm", lambda m, *t: m.grouped_gemm(*t), (rows, w_gate_up, offsets)),
        Case(
            "grouped_gemm_wgrad",
            lambda m, *t: m.grouped_gemm_wgrad(*t),
            (normal(T * K, I), rows, offsets),
        ),
        Case("grouped_sum", lambda m, *t: m.grouped_sum(*t), (rows, offsets)),
        Case("moe_ffn", lambda m, *t: m.moe_ffn(*t[:5], b_gate_up=t[5], b_down=t[6]), layer),
        Case("moe_ffn_packed", _packed_ffn, layer, False),
        # The weights of experts with many tokens are dequantized. Experts with few tokens use
        # integer GEMMs, for which tokens are rounded to 8 bits.
        Case("moe_ffn_quantized", _quantized_ffn, _with_int8(layer), False),
        Case(
            "moe_ffn_quantized",
            _quantized_ffn,
            _with_int8((x[:4], w_gate_up, w_down, weights[:4], ids[:4], *layer[5:])),
            False,
            tolerance=5e-2,
        ),
        Case("grouped_gemm_quantized", _grouped_gemm_int8, (rows, w_gate_up, offsets), False),
        Case("quantize_fp8", _quantize_fp8, (x,), False),
        Case("quantize_fp8_columns", _fp8_columns, (x, offsets, row_to_slot, weights), False),
        Case("grouped_gemm_fp8", _grouped_gemm_fp8, (rows, w_gate_up, offsets), False),
        Case("grouped_gemm_fp8_wgrad", _fp8_wgrad, (normal(T * K, I), rows, offsets), False),
        # An activated feature halfway between two quantized values may be rounded to either.
        Case("moe_ffn_fp8", _fp8_ffn, layer, False, tolerance=5e-3),
        Case("moe_linear_map", lambda m, *t: m.moe_linear_map(*t), (x, w_gate_up, ids)),
        Case(
            "moe_linear_reduce",
            lambda m, *t: m.moe_linear_reduce(*t),
            (normal(T, K, I), w_down, weights, ids),
        ),
        Case(
            "peer_ffn",
            lambda m, *t: m.peer_ffn(*t, activation="swiglu"),
            (x, w_gate_up[:, :2], w_down[..., :1], weights, ids),
        ),
        Case("rotary", _rotary, (normal(2, T, 3, 24),)),
        Case(
            "attention_decode",
            _attention_decode,
            (normal(2, 3, H), normal(H, H), normal(H // 2, H), normal(H // 2, H), normal(H, H)),
            False,
        ),
        Case(
            "mla_decode",
            _mla_decode,
            (
                normal(2, 3, H),
                normal(96, H),
                normal(H, H),
                normal(56),
                normal(128, 56),
                normal(H, H),
            ),
            False,
        ),
        Case("moa_attention", lambda m, *t: m.moa_attention(*t, kind="softmax"), attention),
        Case("moa_attention", lambda m, *t: m.moa_attention(*t, kind="stick_breaking"), attention),
        Case(
            "gated_mlp_decode",
            lambda m, *t: m.gated_mlp_decode(*t[:4], norm_weight=t[4], residual=t[5]),
            (x, normal(I, H), normal(I, H), normal(H, I), normal(H), normal(T, H)),
            False,
        ),
        Case("all_experts_ffn", lambda m, *t: m.all_experts_ffn(*t, activation="silu"), dense),
        Case("mix_expert_outputs", _mix_expert_outputs, mixed),
    ]


# --- ops with operands derived from those of a case, which are leaves


def _packed_ffn(m: Any, x: Tensor, up: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
    *routing, b_up, b_down = rest
    copies = m.pack_experts(up, halves=True), m.pack_experts(down)
    y: Tensor = m.moe_ffn_packed(x, up, down, *copies, *routing, b_gate_up=b_up, b_down=b_down)
    return y


def _attention_decode(m: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(-3, 3, 24, dtype=x.dtype, device=x.device).view(1, 3, 8)
    kept = x.new_zeros(2, 2, 2, 5, 16)
    how: dict[str, Any] = {"start": 1, "rotary_size": 16, "scale": 0.25}
    return m.attention_decode(x, *weights, angles.cos(), angles.sin(), *kept, **how), kept


def _mla_decode(m: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    angles = torch.linspace(-3, 3, 12, dtype=x.dtype, device=x.device).view(1, 3, 4)
    kept = x.new_zeros(2, 1, 5, x.shape[2] - 8), x.new_zeros(2, 1, 5, 8)
    how: dict[str, Any] = {"start": 1, "num_heads": 4, "scale": 0.25, "interleaved": True}
    return m.mla_decode(x, *weights, angles.cos(), angles.sin(), *kept, **how), *kept


def _int8(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(2) / 127
    return (w / scale[:, :, None]).round().to(torch.int8), scale


def _with_int8(layer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, w_gate_up, w_down, *rest = layer
    return (x, *_int8(w_gate_up), *_int8(w_down), *rest)


def _grouped_gemm_int8(m: Any, a: Tensor, b: Tensor, expert_offsets: Tensor) -> Any:
    return m.grouped_gemm_quantized(a, *_int8(b), expert_offsets, format="int8")


def _quantized_ffn(m: Any, *t: Tensor) -> Any:
    return m.moe_ffn_quantized(*t[:7], format="int8", b_gate_up=t[7], b_down=t[8])


def _quantize_fp8(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = m.quantize_fp8(x)
    return q.float(), scale


def _fp8_columns(m: Any, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = m.quantize_fp8_columns(x, *rest)
    return q.float(), scale


def _fp8_wgrad(m: Any, grad: Tensor, a: Tensor, expert_offsets: Tensor) -> Any:
    operands = (*m.quantize_fp8_columns(grad, expert_offsets),)
    operands += (*m.quantize_fp8_columns(a, expert_offsets),)
    if a.dtype == torch.float64:
        operands = tuple(t.double() for t in operands)
    return m.grouped_gemm_fp8_wgrad(*operands, expert_offsets, out_dtype=a.dtype)


def _grouped_gemm_fp8(m: Any, a: Tensor, b: Tensor, expert_offsets: Tensor) -> Any:
    operands = (*m.quantize_fp8(a), *quantize_fp8_blocks(b))
    if a.dtype == torch.float64:
        operands = tuple(t.double() for t in operands)
    return m.grouped_gemm_fp8(*operands, expert_offsets, out_dtype=a.dtype)


def _fp8_ffn(m: Any, x: Tensor, up: Tensor, down: Tensor, *rest: Tensor) -> Any:
    *routing, b_up, b_down = rest
    weights = (*quantize_fp8_blocks(up), *quantize_fp8_blocks(down))
    return m.moe_ffn_fp8(x, *weights, *routing, b_gate_up=b_up, b_down=b_down)


def _rotary(m: Any, t: Tensor) -> Any:
    # Angles are constants; made here, they are not among the leaves.
    where: dict[str, Any] = {"dtype": torch.float64, "device": t.device}
    frequencies = torch.linspace(1, 0.1, t.shape[-1] // 2, **where)
    angles = torch.arange(t.shape[1], **where)[:, None] * frequencies
    return m.rotary(t, angles.cos(), angles.sin())


def _mix_expert_outputs(
    m: Any, outputs: Tensor, weights: Tensor, scale: Tensor, shift: Tensor
) -> Any:
    acc = accumulate_dtype(outputs.dtype)
    norm = {"norm_weight": scale.to(acc), "norm_bias": shift.to(acc)}
    return m.mix_expert_outputs(outputs, weights, activation="silu", **norm)[0]


# --- running a case


def _run_case(case: Case, device: str, dtype: torch.dtype) -> SelfTest:
    forward_error = backward_error = message = None
    seconds = 0.0
    tolerance = max(_TOLERANCES[dtype], case.tolerance)
    try:
        inputs = [_leaf(t.to(device), dtype, case) for t in case.tensors]
        exact_inputs = [_leaf(t, torch.float64, case, rounded_to=dtype) for t in case.tensors]
        started = time.perf_counter()
        outputs = _as_list(case.call(ops, *inputs))
        gradients, cotangents = _gradients(outputs, inputs, case)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        exact_outputs = _as_list(case.call(reference, *exact_inputs))
        exact_gradients, _ = _gradients(exact_outputs, exact_inputs, case, cotangents)
        forward_error = _worst_error(outputs, exact_outputs)
        if case.differentiable:
            backward_error = _worst_error(gradients, exact_gradients)
        passed = forward_error <= tolerance and (backward_error or 0.0) <= tolerance
    except Exception as error:
        passed = False
        message = f"{type(error).__name__}: {error}"
    return SelfTest(
        op=case.op,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        passed=passed,
        forward_error=forward_error,
        backward_error=backward_error,
        tolerance=tolerance,
        seconds=seconds,
        message=message,
    )


def _leaf(
    t: Tensor, dtype: torch.dtype, case: Case, *, rounded_to: torch.dtype | None = None
) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().to(rounded_to or dtype).to(dtype).requires_grad_(case.differentiable)


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _gradients(
    outputs: list[Tensor],
    inputs: list[Tensor],
    case: Case,
    cotangents: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    if not case.differentiable:
        return [], []
    floats = [o for o in outputs if o.is_floating_point()]
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in floats]
    leaves = [t for t in inputs if t.requires_grad]
    matched = [c.to(o) for c, o in zip(cotangents, floats, strict=True)]
    return list(torch.autograd.grad(floats, leaves, matched)), cotangents


def _worst_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the largest relative error of the pairs; infinite if integers, shapes or NaNs
    differ."""
    worst = 0.0
    for a, b in zip(values, exact, strict=True):
        a, b = a.detach().cpu(), b.detach()
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a.long(), b.long()) else float("inf"))
            continue
        error, norm = (a.double() - b).norm().item(), b.norm().item()
        if error != error:
            return float("inf")
        worst = max(worst, error / norm if norm > 0 else (0.0 if error == 0 else float("inf")))
    return worst
