"""peer_ffn: single-neuron experts, whose vectors are gathered from two tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    in_transform,
    needs_input_grad,
    only_needed,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_choice,
    check_float,
    check_index,
    check_like,
    check_positive,
    check_same_device,
    check_size,
    check_tensor,
    new_if,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS

_peer_ffn = direct_call("peer_ffn")


def peer_ffn(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "gelu",
    sparse_grad: bool = False,
) -> Tensor:
    """Computes the FFN of up to millions of single-neuron experts.

    ``y[t] = sum_k topk_weights[t, k] * act(w_gate_up[e] @ x[t]) * w_down[e, :, 0]`` with ``e =
    topk_ids[t, k]``: `moe_ffn` with intermediate size 1, without sorting and GEMMs. The vectors of
    the selected experts are read once, in place; no tensor of size [T, K, H] is allocated, forward
    or backward. It is memory-bound.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        w_gate_up: [E, 1, H] in x's dtype, or [E, 2, H] with a gated activation, the gate first. It
            is copied if the last dimension is not dense.
        w_down: [E, H, 1] in x's dtype. It is copied if H is not dense.
        topk_weights: [T, K] in any float dtype, used in fp32. Differentiable.
        topk_ids: [T, K], int32 or int64, any K; ids outside [0, E) are empty slots, which add
            nothing even if their weight is NaN. Experts may repeat.
        activation: not gated: "gelu", "gelu_tanh", "relu", "relu2", "silu"; gated: "swiglu",
            "geglu", "geglu_tanh", "reglu", "swiglu_oai" (with alpha 1.702 and limit 7).
        sparse_grad: gradients of the tables are coalesced sparse COO tensors with the selected
            experts, for few tokens and many experts and an optimizer that supports them
            (`torch.optim.SparseAdam`). Eager mode only; on CUDA, backward then needs a device sync.
            False: dense gradients, with all rows written.

    Returns:
        [T, H] in x's dtype; sums in fp32 (fp64 for fp64), in slot order. The gradient of an expert
        is summed over its slots in their order.

    Raises:
        ValueError: wrong dtype, rank, size or activation.
        NotImplementedError: on a second derivative; with `sparse_grad` in compiled code and under
            torch.func.

    Source:
        He 2024, Mixture of A Million Experts, arXiv 2407.04153.
    """
    if sparse_grad and (is_compiling() or in_transform()):
        raise NotImplementedError(
            "peer_ffn: sparse_grad must be False in compiled code and under torch.func, got True."
        )
    return _peer_ffn(x, w_gate_up, w_down, topk_weights, topk_ids, activation, sparse_grad)


def _check(
    op: str,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
) -> None:
    check_float(op, "x", x, "[T, H]")
    num_tokens, hidden_size = x.shape
    check_choice(op, "activation", activation, (*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS))
    gated = activation in GATED_ACTIVATIONS
    check_like(op, "w_gate_up", w_gate_up, "x", x, "[E, G, H]")
    num_experts = w_gate_up.shape[0]
    check_positive(op, num_experts=num_experts)
    check_size(op, "w_gate_up", w_gate_up, 1, 1 + gated, "gate and up" if gated else "one vector")
    check_size(op, "w_gate_up", w_gate_up, 2, hidden_size, "H")
    check_like(op, "w_down", w_down, "x", x, "[E, H, 1]", E=num_experts, H=hidden_size)
    check_size(op, "w_down", w_down, 2, 1, "one neuron")
    check_index(op, "topk_ids", topk_ids, "[T, K]", T=num_tokens)
    check_float(op, "topk_weights", topk_weights, "[T, K]", T=num_tokens, K=topk_ids.shape[1])
    check_same_device(
        op, x=x, w_gate_up=w_gate_up, w_down=w_down, topk_weights=topk_weights, topk_ids=topk_ids
    )


@register_fake("peer_ffn_fwd")
def _fake_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    _check("peer_ffn", *args[:6])
    x, w_gate_up, _w_down, _weights, topk_ids, *_ = args
    shape = (x.shape[0], w_gate_up.shape[1], topk_ids.shape[1])
    return x.new_empty(tuple(x.shape)), x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


@register_fake("peer_ffn")
def _(*args: Any) -> Tensor:
    return _fake_fwd(*args)[0]


@register_fake("peer_ffn_bwd")
def _(
    grad_y: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    preact: Tensor,
    grad_ids: Tensor | None,
    activation: str,
    num_rows: int,
    need_x: bool,
    need_w_gate_up: bool,
    need_w_down: bool,
    need_topk_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "peer_ffn_bwd"
    _check(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation)
    (num_tokens, hidden_size), (num_experts, vectors, _) = x.shape, w_gate_up.shape
    top_k = topk_ids.shape[1]
    check_like(op, "grad_y", grad_y, "x", x, "[T, H]", T=num_tokens, H=hidden_size)
    sizes = {"T": num_tokens, "G": vectors, "K": top_k}
    check_tensor(op, "preact", preact, (accumulate_dtype(x.dtype),), "[T, G, K]", **sizes)
    if grad_ids is None:
        check(
            num_rows == num_experts,
            f"{op}: num_rows must be E = {num_experts} without grad_ids, got {num_rows}.",
        )
    else:
        check_index(op, "grad_ids", grad_ids, "[T, K]", T=num_tokens, K=top_k)
        check(
            0 <= num_rows <= num_experts,
            f"{op}: num_rows must be in [0, {num_experts}], got {num_rows}.",
        )
    check_same_device(op, x=x, grad_y=grad_y, preact=preact, grad_ids=grad_ids)
    return (
        new_if(need_x, x),
        new_if(need_w_gate_up, x, (num_rows, vectors, hidden_size)),
        new_if(need_w_down, x, (num_rows, hidden_size, 1)),
        new_if(need_topk_weights, x, topk_ids.shape, accumulate_dtype(x.dtype)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, (activation, sparse_grad) = inputs[:5], inputs[5:]
    _, preact = output
    ctx.mark_non_differentiable(preact)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, preact)
    ctx.activation = activation
    ctx.sparse_grad = sparse_grad


def _chosen(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns the experts in the slots, sorted [U], and the index of each slot's expert among them
    [T, K]; the index of an empty slot is out of range."""
    if topk_ids.numel() == 0:
        return topk_ids.new_empty(0), topk_ids
    ids, places = torch.unique(topk_ids, return_inverse=True)
    before, end = int((ids < 0).sum()), int((ids < num_experts).sum())
    return ids[before:end], places - before


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    call, preact = ctx.saved_tensors[:5], ctx.saved_tensors[5]
    _x, w_gate_up, w_down, topk_weights, topk_ids = call
    needs = needs_input_grad(ctx, 7)[:4]
    rows = places = None
    num_rows = w_gate_up.shape[0]
    if ctx.sparse_grad and (needs[1] or needs[2]):
        rows, places = _chosen(topk_ids, num_rows)
        num_rows = len(rows)
    grads = torch.ops.moe_ops.peer_ffn_bwd(
        grad, *call, preact, places, ctx.activation, num_rows, *needs
    )
    gx, g_gate_up, g_down, g_weights = only_needed(grads, needs)
    if rows is not None:
        g_gate_up = _table_gradient(rows, g_gate_up, w_gate_up)
        g_down = _table_gradient(rows, g_down, w_down)
    if g_weights is not None:
        g_weights = g_weights.to(topk_weights.dtype)
    return gx, g_gate_up, g_down, g_weights, None, None, None


def _table_gradient(rows: Tensor, values: Tensor | None, table: Tensor) -> Tensor | None:
    if values is None:
        return None
    size = tuple(table.shape)
    return torch.sparse_coo_tensor(
        rows[None].long(), values, size, is_coalesced=True, check_invariants=False
    )


register_autograd("peer_ffn", _backward, _setup, forward="peer_ffn_fwd")
register_autograd("peer_ffn_fwd", _backward, _setup)
register_no_double_backward("peer_ffn_bwd")
# Not the autocast dtype: casting the tables would take longer than the op.
register_autocast("peer_ffn", ["x", "w_gate_up", "w_down"], torch.float32)
