"""The block on weights in other formats: 8 and 4 bits, and the layouts of gpt-oss and Llama 4.

Both models store weights with the output features last. gpt-oss interleaves gate and up features,
and has biases and a clamped activation; Llama 4 multiplies tokens by the routing weight before the
experts. References are the layer in fp64, for some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.gpu.block import GROUPED, OURS, grouped_mm, torch_grouped_mm
from bench.gpu.cases import STORED, Case
from bench.gpu.fp8 import BF16
from bench.gpu.gradients import with_backward
from bench.gpu.layer import Layer
from bench.gpu.problem import Problem, gradient_check, relative, sampled
from moe_ops.bench.baselines import tolerance
from moe_ops.bench.shapes import exact_output

_ALPHA, _LIMIT = 1.702, 7.0


def format_problem(case: Case, layer: Layer) -> Problem:
    return (_stored if case.part in STORED else _integers)(case, layer)


def _integers(case: Case, layer: Layer) -> Problem:
    tokens, bank = layer.tokens, layer.bank
    weights = layer.weights.int8 if case.dtype == "int8" else layer.weights.int4
    format = "int8" if case.dtype == "int8" else "int4 g64"
    routing = (tokens.topk_weights, tokens.topk_ids)
    rows = sampled(case.T, layer.device)
    truth = exact_output(bank, tokens, rows)
    arguments = (tokens.x, bank.w_gate_up, bank.w_down, *routing)
    jobs: dict[str, Callable[[], Any]] = {
        OURS: lambda: moe_ops.moe_ffn_quantized(tokens.x, *weights, *routing, format=format),
        BF16: lambda: moe_ops.moe_ffn(*arguments),
        GROUPED: lambda: torch_grouped_mm(*arguments),
    }
    return Problem(jobs, lambda y: relative(y[rows], truth), tolerance(case.dtype))


def _tensors(given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Returns w_gate_up, b_gate_up, w_down, b_down from `Weights.stored`."""
    return tuple(given) if len(given) == 4 else (given[0], None, given[1], None)


def clamped(pre: Tensor) -> Tensor:
    """Computes gpt-oss's activation, gate in even and up in odd features."""
    gate = pre[..., ::2].clamp(max=_LIMIT)
    up = pre[..., 1::2].clamp(-_LIMIT, _LIMIT)
    return (up + 1) * gate * torch.sigmoid(_ALPHA * gate)


def halves(pre: Tensor) -> Tensor:
    """Computes Llama 4's activation."""
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate) * up


def stored_grouped_mm(x: Tensor, *rest: Tensor) -> Tensor:
    """Computes the block as transformers does with weights [E, H, 2I] and [E, I, H]."""
    *given, weights, ids = rest
    w_gate_up, b_gate_up, w_down, b_down = _tensors(given)
    T, K = ids.shape
    E = w_gate_up.shape[0]
    experts, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(experts if ids.is_cuda else experts.float(), E, 0, E - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    factors = weights.reshape(-1)[order, None].to(x.dtype)
    if b_gate_up is None or b_down is None:
        out = grouped_mm(halves(grouped_mm(x[order // K] * factors, w_gate_up, ends)), w_down, ends)
    else:
        pre = grouped_mm(x[order // K], w_gate_up, ends) + b_gate_up[experts]
        out = (grouped_mm(clamped(pre), w_down, ends) + b_down[experts]) * factors
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return out[back].view(T, K, -1).sum(1)


def ours_stored(x: Tensor, *rest: Tensor) -> Tensor:
    *given, weights, ids = rest
    w_gate_up, b_gate_up, w_down, b_down = _tensors(given)
    arguments = (x, w_gate_up.transpose(1, 2), w_down.transpose(1, 2), weights, ids)
    if b_gate_up is None:
        return moe_ops.moe_ffn(*arguments, apply_router_weight_on_input=True)
    return moe_ops.moe_ffn(
        *arguments,
        b_gate_up=b_gate_up,
        b_down=b_down,
        activation="swiglu_oai",
        interleaved=True,
        alpha=_ALPHA,
        limit=_LIMIT,
    )


def _stored(case: Case, layer: Layer) -> Problem:
    tokens, ids = layer.tokens, layer.tokens.topk_ids
    inputs = (tokens.x, *layer.weights.stored.values(), tokens.topk_weights)
    rows = sampled(case.T, layer.device)
    exact_x = tokens.x[rows].double()
    blocks = {OURS: ours_stored, GROUPED: stored_grouped_mm}

    def exact(x: Tensor) -> Tensor:
        return _exact_stored(x, layer.weights.stored, tokens.topk_weights[rows], ids[rows])

    if case.part == "forward_stored":
        truth = exact(exact_x)
        jobs = {n: lambda block=block: block(*inputs, ids) for n, block in blocks.items()}
        return Problem(jobs, lambda y: relative(y[rows], truth), tolerance("bf16"))

    truth = with_backward(exact, [exact_x], layer.grad_y[rows].double())()[0]
    steps = {
        n: with_backward(lambda *leaves, block=block: block(*leaves, ids), inputs, layer.grad_y)
        for n, block in blocks.items()
    }
    check = gradient_check(lambda dx: relative(dx[rows], truth))
    return Problem(steps, check, 2 * tolerance("bf16"))


def _exact_stored(x: Tensor, stored: dict[str, Tensor], weights: Tensor, ids: Tensor) -> Tensor:
    """Computes the block in fp64, expert by expert, to save memory; differentiable with respect to
    x."""
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        factors = weights[token, slot, None].double()
        own = [t[expert].double() for t in stored.values()]
        if len(own) == 2:
            out = halves(x[token] * factors @ own[0]) @ own[1]
        else:
            out = (clamped(x[token] @ own[0] + own[1]) @ own[2] + own[3]) * factors
        y = y.index_add(0, token, out)
    return y
