"""Mixtures of attention heads: the GEMMs of their experts, and the attention itself.

The GEMMs have the sizes of the layer: moe_linear_map maps tokens [T, H] to slots [T, K, I],
moe_linear_reduce slots back to tokens. Attention is causal softmax over sequences of up to 4096
tokens with H / d heads and K query slots for each key, as in JetMoE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.gpu.block import GROUPED, OURS, grouped_mm
from bench.gpu.cases import Case, attention_size
from bench.gpu.gradients import with_backward
from bench.gpu.layer import Layer
from bench.gpu.problem import Problem, gradient_check, relative, sampled

SDPA = "torch sdpa"
_TOLERANCE = 2.0**-6


def attention_problem(case: Case, layer: Layer) -> Problem:
    size = attention_size(case)
    B, S, K, n, d = size
    q = layer.normal(B, S, K, n, d)
    k, v = (layer.normal(B, S, n, d) for _ in range(2))
    grad = layer.normal(B, S, K, n, d)
    queries = sampled(S, layer.device)
    # torch has the head dimension in front, with heads that share keys contiguous, and gets that
    # layout.
    swapped = q.permute(0, 3, 2, 1, 4).reshape(B, n * K, S, d)
    keys, values = (t.transpose(1, 2).contiguous() for t in (k, v))
    grad_swapped = grad.permute(0, 3, 2, 1, 4).reshape(B, n * K, S, d)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = moe_ops.moa_attention(q, k, v, kind="softmax")
        return out[0] if isinstance(out, tuple) else out

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def exact(some: Tensor) -> Tensor:
        """Computes attention of queries [s, K, n, d] of the first sequence, in fp64."""
        logits = torch.einsum("skhd,jhd->skhj", some, k[0].double()) * d**-0.5
        hidden = torch.arange(S, device=q.device) > queries[:, None]
        weights = logits.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("skhj,jhd->skhd", weights, v[0].double())

    def picked(t: Tensor) -> Tensor:
        """Returns the sampled queries of the first sequence, for either layout."""
        if t.dim() == 4:
            return t[0].reshape(n, K, S, d)[:, :, queries].permute(2, 1, 0, 3)
        return t[0, queries]

    some = q[0, queries].double()
    if not case.part.endswith("training"):
        truth = exact(some)
        jobs: dict[str, Callable[[], Any]] = {
            OURS: lambda: ours(q, k, v),
            SDPA: lambda: sdpa(swapped, keys, values),
        }
        return Problem(jobs, lambda y: relative(picked(y), truth), _TOLERANCE)

    truth = with_backward(exact, [some], grad[0, queries].double())()[0]
    steps = {
        OURS: with_backward(ours, [q, k, v], grad),
        SDPA: with_backward(sdpa, [swapped, keys, values], grad_swapped),
    }
    same = gradient_check(lambda dq: relative(picked(dq), truth))

    def check(found: tuple[Tensor, ...]) -> float:
        dq, dk, dv = found
        if dq.dim() == 4:
            dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
        return same((dq, dk, dv))

    return Problem(steps, check, 2 * _TOLERANCE)


def linear_problem(case: Case, layer: Layer) -> Problem:
    reduces = case.part.startswith("moe_linear_reduce")
    T, K, I = case.T, case.shape.K, case.shape.I
    tokens, ids = layer.tokens, layer.tokens.topk_ids
    rows = sampled(T, layer.device)
    if reduces:
        inputs: tuple[Tensor, ...] = (layer.rows_i.view(T, K, I), layer.bank.w_down)
        inputs = (*inputs, tokens.topk_weights)
        grad = layer.grad_y
    else:
        inputs = (tokens.x, layer.bank.w_gate_up[:, :I])
        grad = layer.rows_i.view(T, K, I)

    def ours(x: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
        op = moe_ops.moe_linear_reduce if reduces else moe_ops.moe_linear_map
        return op(x, w, *weights, ids)

    def exact(some: Tensor) -> Tensor:
        w = inputs[1]
        slots = some[:, None].expand(-1, K, -1) if not reduces else some
        experts = ids[rows].long()
        out = torch.stack(
            [
                torch.stack([w[e].double() @ slot for e, slot in zip(own, line, strict=True)])
                for own, line in zip(experts.tolist(), slots, strict=True)
            ]
        )
        weights = tokens.topk_weights[rows].double()[:, :, None]
        return (out * weights).sum(1) if reduces else out

    def torch_way(x: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
        experts, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(experts if ids.is_cuda else experts.float(), w.shape[0], 0, len(w) - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        own = x.reshape(-1, x.shape[-1])[order if reduces else order // K]
        out = grouped_mm(own, w.transpose(1, 2), ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        slots = out[back].view(T, K, -1)
        return (slots * weights[0][:, :, None].to(out.dtype)).sum(1) if reduces else slots

    some = inputs[0][rows].double()
    if not case.part.endswith("training"):
        truth = exact(some)
        jobs = {OURS: lambda: ours(*inputs), GROUPED: lambda: torch_way(*inputs)}
        return Problem(jobs, lambda y: relative(y[rows], truth), _TOLERANCE)

    truth = with_backward(exact, [some], grad[rows].double())()[0]
    steps = {
        OURS: with_backward(ours, inputs, grad),
        GROUPED: with_backward(torch_way, inputs, grad),
    }
    return Problem(steps, gradient_check(lambda dx: relative(dx[rows], truth)), 2 * _TOLERANCE)
