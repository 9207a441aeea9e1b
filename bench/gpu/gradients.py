"""Ops that move or weigh rows, with backward, against equivalent torch code.

The result of a job is the gradients alone. References are explicit formulas in fp64, for a sample
of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import moe_ops
from bench.gpu.block import OURS
from bench.gpu.cases import Case
from bench.gpu.layer import Layer
from bench.gpu.ops import (
    GATHER_SUM,
    INDEX_SELECT,
    SILU_MUL,
    SOFTMAX_TOPK,
    gather_sum,
    silu_mul,
    softmax_topk,
)
from bench.gpu.problem import Problem, relative, sampled, worst
from moe_ops import reference

Gradients = tuple[Tensor, ...]
# Sums of a few values that were rounded to bf16.
_TOLERANCE = 2.0**-6


def gradient_problem(case: Case, layer: Layer) -> Problem:
    return _PROBLEMS[case.part](case, layer)


def with_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], Gradients]:
    """Returns a job that runs `function` on the inputs, then computes gradients of all inputs."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)

    def job() -> Gradients:
        with torch.enable_grad():
            out = function(*leaves)
        return torch.autograd.grad(out, leaves, grad)

    return job


def _topk_router(case: Case, layer: Layer) -> Problem:
    logits, K = layer.logits, case.shape.K
    grad = layer.tokens.topk_weights
    rows = sampled(case.T, layer.device)
    exact = logits[rows].double()
    truth = with_backward(lambda x: _weights(reference, x, K), [exact], grad[rows].double())()[0]
    jobs = {
        OURS: with_backward(lambda x: _weights(moe_ops, x, K), [logits], grad),
        SOFTMAX_TOPK: with_backward(lambda x: softmax_topk(x, K)[0], [logits], grad),
    }
    return Problem(jobs, lambda found: relative(found[0][rows], truth), 1e-4)


def _weights(module: object, logits: Tensor, K: int) -> Tensor:
    weights: Tensor = module.topk_router(logits, K, renormalize=True)[0]  # type: ignore[attr-defined]
    return weights


def _permute(case: Case, layer: Layer) -> Problem:
    x, (offsets, row_to_slot, slot_to_row) = layer.tokens.x, layer.sorted
    tokens, grad = row_to_slot.long() // case.shape.K, layer.rows_h
    rows = sampled(case.T, layer.device)
    truth = grad[slot_to_row[rows].long()].double().sum(1)
    ours = lambda x: moe_ops.permute(x, offsets, row_to_slot)  # noqa: E731
    jobs = {
        OURS: with_backward(ours, [x], grad),
        INDEX_SELECT: with_backward(lambda x: x.index_select(0, tokens), [x], grad),
    }
    # index_select adds in the type of x, K times.
    return Problem(jobs, lambda found: relative(found[0][rows], truth), _TOLERANCE)


def _unpermute(case: Case, layer: Layer) -> Problem:
    rows_h, weights, grad = layer.rows_h, layer.tokens.topk_weights, layer.grad_y
    offsets, row_to_slot, slot_to_row = layer.sorted
    slots = slot_to_row.long()
    rows, tokens = sampled(case.num_slots, layer.device), sampled(case.T, layer.device)
    own = row_to_slot[rows].long()
    by_rows = weights.view(-1)[own].double()[:, None] * grad[own // case.shape.K].double()
    by_weights = (rows_h[slots[tokens]].double() * grad[tokens].double()[:, None]).sum(-1)
    ours = lambda rows, w: moe_ops.unpermute(rows, offsets, slot_to_row, w)  # noqa: E731
    jobs = {
        OURS: with_backward(ours, [rows_h, weights], grad),
        GATHER_SUM: with_backward(
            lambda rows, w: gather_sum(rows, slots, w), [rows_h, weights], grad
        ),
    }

    def check(found: Gradients) -> float:
        return worst([relative(found[0][rows], by_rows), relative(found[1][tokens], by_weights)])

    return Problem(jobs, check, _TOLERANCE)


def _gated_act(case: Case, layer: Layer) -> Problem:
    pre, grad = layer.rows_2i, layer.rows_i
    rows = sampled(case.num_slots, layer.device)
    truth = with_backward(silu_mul, [pre[rows].double()], grad[rows].double())()[0]
    jobs = {
        OURS: with_backward(lambda x: moe_ops.gated_act(x, "swiglu"), [pre], grad),
        SILU_MUL: with_backward(silu_mul, [pre], grad),
    }
    return Problem(jobs, lambda found: relative(found[0][rows], truth), _TOLERANCE)


_PROBLEMS = {
    "topk_router_training": _topk_router,
    "permute_training": _permute,
    "unpermute_training": _unpermute,
    "gated_act_training": _gated_act,
}
