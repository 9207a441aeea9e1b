"""Each op alone, against equivalent torch code.

References are in fp64, of a sample of rows if the whole would cost more than the measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.gpu.block import GROUPED, LOOP, OURS, grouped_mm
from bench.gpu.cases import Case
from bench.gpu.layer import Layer
from bench.gpu.problem import Problem, relative, sampled
from moe_ops import reference

# A result that is rounded once, and one computed from rounded factors.
_ONCE, _TWICE = 2.0**-8, 2.0**-7

SOFTMAX_TOPK, INDEX_SELECT = "softmax, topk", "index_select"
GATHER_SUM, SILU_MUL = "gather, weigh, sum", "silu, mul"


def softmax_topk(logits: Tensor, K: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.softmax(logits, -1).topk(K, -1)
    return values / values.sum(-1, keepdim=True), ids


def gather_sum(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Computes the weighted sum of rows; slots [T, K] are the rows of a token."""
    T, K = slots.shape
    gathered = rows[slots.reshape(-1)].view(T, K, -1)
    return (gathered * weights[:, :, None].to(rows.dtype)).sum(1)


def silu_mul(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate) * up


def op_problem(case: Case, layer: Layer) -> Problem:
    return _PROBLEMS[case.part](case, layer)


def _topk_router(case: Case, layer: Layer) -> Problem:
    logits, K = layer.logits, case.shape.K
    rows = sampled(case.T, layer.device)

    weights, ids = reference.topk_router(logits[rows].double(), K, renormalize=True)

    def check(result: tuple[Tensor, Tensor]) -> float:
        if not torch.equal(result[1][rows].int(), ids.int()):
            return float("inf")
        return relative(result[0][rows], weights)

    ours = lambda: moe_ops.topk_router(logits, K, renormalize=True)  # noqa: E731
    return Problem({OURS: ours, SOFTMAX_TOPK: lambda: softmax_topk(logits, K)}, check, 1e-5)


def _sort_by_expert(case: Case, layer: Layer) -> Problem:
    ids, E = layer.tokens.topk_ids, case.shape.E

    def sort_histogram() -> tuple[Tensor, Tensor, Tensor]:
        sorted_ids, row_to_slot = torch.sort(ids.reshape(-1), stable=True)
        counts = torch.histc(sorted_ids if ids.is_cuda else sorted_ids.float(), E, 0, E - 1)
        offsets = F.pad(torch.cumsum(counts, 0, dtype=torch.int32), (1, 0))
        slot_to_row = torch.empty_like(row_to_slot)
        slot_to_row[row_to_slot] = torch.arange(row_to_slot.numel(), device=ids.device)
        return offsets, row_to_slot, slot_to_row.view(ids.shape)

    def check(result: tuple[Tensor, ...]) -> float:
        same = all(torch.equal(a.int(), b) for a, b in zip(result, layer.sorted, strict=True))
        return 0.0 if same else float("inf")

    ours = lambda: moe_ops.sort_by_expert(ids, E)  # noqa: E731
    return Problem({OURS: ours, "sort, histc, cumsum": sort_histogram}, check, 0.0)


def _permute(case: Case, layer: Layer) -> Problem:
    x, (offsets, row_to_slot, _) = layer.tokens.x, layer.sorted
    tokens = row_to_slot.long() // case.shape.K
    rows = sampled(case.num_slots, layer.device)
    truth = x[tokens[rows]]
    return Problem(
        {
            OURS: lambda: moe_ops.permute(x, offsets, row_to_slot),
            INDEX_SELECT: lambda: x.index_select(0, tokens),
        },
        lambda y: relative(y[rows], truth),
        0.0,
    )


def _unpermute(case: Case, layer: Layer) -> Problem:
    rows_h, (offsets, _, slot_to_row) = layer.rows_h, layer.sorted
    weights = layer.tokens.topk_weights
    slots = slot_to_row.long()
    tokens = sampled(case.T, layer.device)
    mine = rows_h[slot_to_row[tokens].long()].double()
    truth = (mine * weights[tokens][:, :, None].double()).sum(1)
    ours = lambda: moe_ops.unpermute(rows_h, offsets, slot_to_row, weights)  # noqa: E731
    return Problem(
        {OURS: ours, GATHER_SUM: lambda: gather_sum(rows_h, slots, weights)},
        lambda y: relative(y[tokens], truth),
        2 * _TWICE,
    )


def _gated_act(case: Case, layer: Layer) -> Problem:
    pre = layer.rows_2i
    rows = sampled(case.num_slots, layer.device)
    truth = silu_mul(pre[rows].double())
    return Problem(
        {OURS: lambda: moe_ops.gated_act(pre, "swiglu"), SILU_MUL: lambda: silu_mul(pre)},
        lambda y: relative(y[rows], truth),
        _TWICE,
    )


def _grouped_gemm(a: Tensor, b: Tensor, layer: Layer) -> Problem:
    offsets, counts = layer.sorted[0], layer.counts
    ends = offsets[1:].contiguous()
    transposed = b.transpose(1, 2)
    used = [e for e, count in enumerate(counts) if count]
    parts = a.split([counts[e] for e in used])
    out = a.new_empty(a.shape[0], b.shape[1])
    outs = out.split([counts[e] for e in used])

    def loop() -> Tensor:
        for e, own, target in zip(used, parts, outs, strict=True):
            torch.mm(own, transposed[e], out=target)
        return out

    rows = sampled(a.shape[0], layer.device)
    experts = torch.searchsorted(ends, rows.to(ends.dtype), right=True)
    truth = torch.stack(
        [b[e].double() @ a[row].double() for e, row in zip(experts.tolist(), rows, strict=True)]
    )
    return Problem(
        {
            OURS: lambda: moe_ops.grouped_gemm(a, b, offsets),
            GROUPED: lambda: grouped_mm(a, transposed, ends),
            LOOP: loop,
        },
        lambda y: relative(y[rows], truth),
        _TWICE,
    )


def _wgrad(case: Case, layer: Layer) -> Problem:
    grad, a = layer.rows_2i, layer.rows_h
    offsets, counts = layer.sorted[0], layer.counts
    ends = offsets[1:].contiguous()
    # Some rows of the largest expert.
    expert = max(range(len(counts)), key=counts.__getitem__)
    begin = int(offsets[expert])
    own = slice(begin, begin + counts[expert])
    stride = max(1, grad.shape[1] // 16)
    truth = grad[own, ::stride].double().T @ a[own].double()
    used = [e for e, count in enumerate(counts) if count]
    pairs = list(zip(used, *(t.split([counts[e] for e in used]) for t in (grad, a)), strict=True))
    # Experts without rows stay zero.
    out = grad.new_zeros(case.shape.E, grad.shape[1], a.shape[1])

    def loop() -> Tensor:
        for e, g, rows in pairs:
            torch.mm(g.T, rows, out=out[e])
        return out

    return Problem(
        {
            OURS: lambda: moe_ops.grouped_gemm_wgrad(grad, a, offsets),
            GROUPED: lambda: grouped_mm(grad.T, a, ends),
            LOOP: loop,
        },
        lambda y: relative(y[expert, ::stride], truth),
        _TWICE,
    )


_PROBLEMS: dict[str, Callable[[Case, Layer], Any]] = {
    "topk_router": _topk_router,
    "sort_by_expert": _sort_by_expert,
    "permute": _permute,
    "unpermute": _unpermute,
    "gated_act": _gated_act,
    "grouped_gemm": lambda case, layer: _grouped_gemm(layer.rows_h, layer.bank.w_gate_up, layer),
    "grouped_gemm_down": lambda case, layer: _grouped_gemm(layer.rows_i, layer.bank.w_down, layer),
    "grouped_gemm_wgrad": _wgrad,
}
