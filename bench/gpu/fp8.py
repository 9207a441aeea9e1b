"""The fp8 ops, float8_e4m3fn with one scale per 128 elements: the block, its first GEMM, the
rounding of activations. References use the unrounded layer, so that other scalings can be
compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moe_ops
from bench.gpu.block import OURS
from bench.gpu.cases import Case
from bench.gpu.layer import Layer
from bench.gpu.problem import Problem, relative, sampled
from moe_ops.bench.shapes import exact_output

BF16 = "moe_ops bf16"
ROWWISE = "torch scaled_grouped_mm"
_FP8_MAX = 448.0
# Rounding to three mantissa bits has a relative error of 2.6 % (root mean square); a GEMM has two
# rounded operands, the block two GEMMs in sequence. The tolerance is twice that.
_ROUNDED = 0.026
_PRODUCT, _BLOCK = 2 * 2**0.5 * _ROUNDED, 2 * 2 * _ROUNDED


def fp8_problem(case: Case, layer: Layer) -> Problem:
    return _PROBLEMS[case.part](case, layer)


def _forward(case: Case, layer: Layer) -> Problem:
    tokens, bank, weights = layer.tokens, layer.bank, layer.weights.fp8
    routing = (tokens.topk_weights, tokens.topk_ids)
    rows = sampled(case.T, layer.device)
    truth = exact_output(bank, tokens, rows)
    ours = lambda: moe_ops.moe_ffn_fp8(tokens.x, *weights, *routing)  # noqa: E731
    bf16 = lambda: moe_ops.moe_ffn(tokens.x, bank.w_gate_up, bank.w_down, *routing)  # noqa: E731
    return Problem({OURS: ours, BF16: bf16}, lambda y: relative(y[rows], truth), _BLOCK)


def _product(case: Case, layer: Layer) -> Problem:
    """Returns the up projection with operands rounded beforehand."""
    a, b, offsets = layer.rows_h, layer.bank.w_gate_up, layer.sorted[0]
    ends = offsets[1:].contiguous()
    q, q_scale = layer.weights.fp8[:2]
    a_q, a_scale = moe_ops.quantize_fp8(a)
    rows = sampled(a.shape[0], layer.device)
    experts = torch.searchsorted(ends, rows.to(ends.dtype), right=True)
    pairs = zip(experts.tolist(), rows.tolist(), strict=True)
    truth = torch.stack([b[e].double() @ a[row].double() for e, row in pairs])
    jobs: dict[str, Callable[[], Any]] = {
        OURS: lambda: moe_ops.grouped_gemm_fp8(a_q, a_scale, q, q_scale, offsets),
        BF16: lambda: moe_ops.grouped_gemm(a, b, offsets),
    }
    absent = {}
    if layer.device.type == "cuda":
        rowwise_a, rowwise_b = _by_rows(a), _by_rows(b)

        def rowwise() -> Tensor:
            return torch._scaled_grouped_mm(
                rowwise_a[0],
                rowwise_b[0].transpose(1, 2),
                rowwise_a[1],
                rowwise_b[1],
                offs=ends,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        jobs[ROWWISE] = rowwise
    else:
        absent[ROWWISE] = "needs a CUDA device"
    return Problem(jobs, lambda y: relative(y[rows], truth), _PRODUCT, absent)


def _quantize(case: Case, layer: Layer) -> Problem:
    x = layer.tokens.x
    rows = sampled(case.T, layer.device)

    def amax_divide() -> tuple[Tensor, Tensor]:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).float()
        blocks = padded.unflatten(1, (-1, 128))
        scale = blocks.abs().amax(2).clamp_min(1e-30) / _FP8_MAX
        codes = (blocks / scale[:, :, None]).to(torch.float8_e4m3fn).flatten(1)
        return codes[:, : x.shape[1]].contiguous(), scale

    def check(result: tuple[Tensor, Tensor]) -> float:
        codes, scale = (t[rows].double() for t in result)
        scale = scale.repeat_interleave(128, 1)[:, : x.shape[1]]
        return relative(codes * scale, x[rows].double())

    jobs = {OURS: lambda: moe_ops.quantize_fp8(x), "amax, divide": amax_divide}
    return Problem(jobs, check, 2 * _ROUNDED)


def _by_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes with one scale per row, one expert at a time, which avoids an fp32 copy of all
    experts."""
    codes = torch.empty(t.shape, dtype=torch.float8_e4m3fn, device=t.device)
    scales = torch.empty(t.shape[:-1], device=t.device)
    size = 4096 if t.dim() == 2 else 1
    for part, code, scale in zip(t.split(size), codes.split(size), scales.split(size), strict=True):
        values = part.float()
        scale.copy_(values.abs().amax(-1).clamp_min(1e-30) / _FP8_MAX)
        code.copy_((values / scale[..., None]).to(torch.float8_e4m3fn))
    return codes, scales


_PROBLEMS: dict[str, Callable[[Case, Layer], Problem]] = {
    "forward_fp8": _forward,
    "grouped_gemm_fp8": _product,
    "quantize_fp8": _quantize,
}
