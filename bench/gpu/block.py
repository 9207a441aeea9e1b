"""The whole expert block: moe_ops, fused and op by op, and implementations in plain torch.

An implementation is a function of (x [T, H], w_gate_up [E, 2I, H], w_down [E, H, I], topk_weights
[T, K], topk_ids [T, K]) that returns y [T, H] without a device sync.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.gpu.cases import Case
from bench.gpu.layer import Layer
from bench.gpu.peers import PEERS
from bench.gpu.problem import Problem, gradient_check, relative, sampled
from moe_ops.bench.baselines import exact_grad_x, tolerance
from moe_ops.bench.shapes import Tokens, exact_output

Block = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
OURS = "moe_ops"
UNFUSED = "moe_ops unfused"
GROUPED = "torch grouped_mm"
LOOP = "cuBLAS loop"
BATCHED = "batched_mm compiled"

# batched_mm copies a matrix per slot: for decoding only.
_BATCHED_TOKENS = 64
_BATCHED_BYTES = 8e9


def unfused(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Computes the block op by op, with a permuted copy of x."""
    offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, w_gate_up.shape[0])
    rows = moe_ops.permute(x, offsets, row_to_slot)
    hidden = moe_ops.gated_act(moe_ops.grouped_gemm(rows, w_gate_up, offsets), "swiglu")
    out = moe_ops.grouped_gemm(hidden, w_down, offsets)
    return moe_ops.unpermute(out, offsets, slot_to_row, weights)


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Calls torch's grouped GEMM by its public name, or the private one of older versions."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(a, b, offs=ends)


def torch_grouped_mm(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """Computes the block as transformers does: sort, gather, torch's grouped GEMMs, weigh, gather
    back, sum."""
    T, K = ids.shape
    E = w_gate_up.shape[0]
    sorted_ids, order = torch.sort(ids.reshape(-1))
    # CPU: histc counts floats only.
    counts = torch.histc(sorted_ids if ids.is_cuda else sorted_ids.float(), E, 0, E - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    gate, up = grouped_mm(x[order // K], w_gate_up.transpose(1, 2), ends).chunk(2, dim=-1)
    out = grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), ends)
    out = out * weights.reshape(-1)[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return out[back].view(T, K, -1).sum(1)


def cublas_loop(tokens: Tokens, num_experts: int) -> Block:
    """Runs one GEMM per expert, with counts known to the host beforehand: no implementation has
    them without a device sync, so this is a bound for loops."""
    counts = torch.bincount(tokens.topk_ids.reshape(-1).long(), minlength=num_experts).tolist()
    order = torch.sort(tokens.topk_ids.reshape(-1), stable=True).indices
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    used = [e for e in range(num_experts) if counts[e]]
    sizes = [counts[e] for e in used]

    def block(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        T, K = ids.shape
        rows = x[order // K].split(sizes)
        # Unbound once: indexing per expert would add a gradient of the size of all experts for
        # each.
        w_up, w_out = w_gate_up.unbind(), w_down.unbind()
        outs = []
        for e, own in zip(used, rows, strict=True):
            gate, up = F.linear(own, w_up[e]).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, w_out[e]))
        out = torch.cat(outs)[back].view(T, K, -1)
        return (out * weights[:, :, None].to(out.dtype)).sum(1)

    return block


def batched_mm(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """Gathers one matrix per slot, and runs one batched GEMM."""
    T, K = ids.shape
    flat = ids.reshape(-1).long()
    rows = x.repeat_interleave(K, 0)[:, :, None]
    gate, up = torch.bmm(w_gate_up[flat], rows)[:, :, 0].chunk(2, dim=-1)
    out = torch.bmm(w_down[flat], (F.silu(gate) * up)[:, :, None])[:, :, 0]
    return (out.view(T, K, -1) * weights[:, :, None].to(out.dtype)).sum(1)


def block_problem(case: Case, layer: Layer, compiled: Callable[[Any], Any]) -> Problem:
    """Returns the forward problem, or forward and the gradients of x, of both weights and of the
    routing weights."""
    training = case.part == "training"
    tokens = layer.tokens
    blocks: dict[str, Block] = {
        OURS: moe_ops.moe_ffn,
        UNFUSED: unfused,
        GROUPED: torch_grouped_mm,
        LOOP: cublas_loop(tokens, case.shape.E),
    }
    absent: dict[str, str] = {}
    gathered = 2.0 * case.num_slots * 3 * case.shape.H * case.shape.I
    if not training and case.T <= _BATCHED_TOKENS and gathered <= _BATCHED_BYTES:
        blocks[BATCHED] = compiled(batched_mm)
    for peer in PEERS:
        if training and not peer.trains:
            continue
        why = peer.missing(layer.device)
        if why is None:
            blocks[peer.name] = peer.block
        else:
            absent[peer.name] = why
    bind = _training if training else _forward
    jobs = {name: bind(block, layer) for name, block in blocks.items()}
    check = _gradient_check(layer) if training else _output_check(layer)
    return Problem(jobs, check, (2 if training else 1) * tolerance("bf16"), absent)


def _forward(block: Block, layer: Layer) -> Callable[[], Tensor]:
    tokens, bank = layer.tokens, layer.bank
    arguments = (tokens.x, bank.w_gate_up, bank.w_down, tokens.topk_weights, tokens.topk_ids)

    def job() -> Tensor:
        with torch.no_grad():
            return block(*arguments)

    return job


def _training(block: Block, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    tokens, bank = layer.tokens, layer.bank
    inputs = (tokens.x, bank.w_gate_up, bank.w_down, tokens.topk_weights)
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    grad_y, ids = layer.grad_y, tokens.topk_ids

    def job() -> tuple[Tensor, ...]:
        x, w_gate_up, w_down, weights = leaves
        with torch.enable_grad():
            y = block(x, w_gate_up, w_down, weights, ids)
        return torch.autograd.grad(y, leaves, grad_y)

    return job


def _output_check(layer: Layer) -> Callable[[Any], float]:
    rows = sampled(layer.tokens.count, layer.device)
    truth = exact_output(layer.bank, layer.tokens, rows)
    return lambda y: relative(y[rows], truth)


def _gradient_check(layer: Layer) -> Callable[[Any], float]:
    """Checks dx of some tokens in fp64, which depends on these tokens alone."""
    tokens, rows = layer.tokens, sampled(layer.tokens.count, layer.device)
    some = Tokens(tokens.x[rows], tokens.topk_weights[rows], tokens.topk_ids[rows])
    truth = exact_grad_x(layer.bank, some, layer.grad_y[rows])
    return gradient_check(lambda dx: relative(dx[rows], truth))
