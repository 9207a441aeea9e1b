"""dense_ffn: every expert of a bank on every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_dim,
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_size,
    dtype_name,
)
from moe_ops.ops._library import register_cuda_formula, register_fake
from moe_ops.ops.gated_act import PLAIN_ACTIVATIONS
from moe_ops.reference.gated_act import plain_act

_dense_ffn = direct_call("dense_ffn")

_OP = "dense_ffn"
DENSE_ACTIVATIONS = ("none", *PLAIN_ACTIVATIONS)


def dense_ffn(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Small networks of one hidden layer, all of them on all tokens: no routing, no slots.

    ``y[t, e] = w_down[e] @ act(w_up[e] @ x[t, input_ids[e]] + b_up[e]) + b_down[e]``. The dense
    experts of multi-task models and their towers; with ``activation="none"`` low-rank maps. A block
    of tokens stays in cache from the first product to the last; the weights are read once a block,
    so they should be small beside the tokens. On CUDA tensors it is two batched products of
    cuBLAS.

    Args:
        x: [T, G, H], G inputs a token; float64, float32, bfloat16 or float16, any strides.
        w_up: [E, I, H] in x's dtype, any strides.
        w_down: [E, O, I] in x's dtype, any strides.
        input_ids: [E], int32 or int64 in [0, G): which input each expert reads. On CUDA, where
            values cannot raise, one outside counts as the nearest inside.
        b_up: [E, I] in x's dtype, or None.
        b_down: [E, O] in x's dtype, or None.
        activation: "none", "relu", "relu2", "silu", "gelu" or "gelu_tanh".

    Returns:
        [T, E, O] in x's dtype; sums and what lies between the products in fp32 (fp64 for fp64). On
        CUDA, what lies between the products is rounded to x's dtype.

    Raises:
        ValueError: wrong dtype, rank, size or activation, an input that does not exist.
        NotImplementedError: on a second derivative.

    Source:
        Ma et al. 2018, Multi-gate Mixture-of-Experts, KDD.
    """
    return _dense_ffn(x, w_up, w_down, input_ids, b_up, b_down, activation)


def _check(
    op: str, x: Tensor, w_up: Tensor, w_down: Tensor, input_ids: Tensor, activation: str
) -> None:
    check_float(op, "x", x)
    check_dim(op, "x", x, 3, "[T, G, H]")
    check_same_dtype(op, "w_up", w_up, "x", x)
    check_dim(op, "w_up", w_up, 3, "[E, I, H]")
    check(w_up.shape[0] >= 1, f"{op}: num_experts must be at least 1, got {w_up.shape[0]}.")
    check_size(op, "w_up", w_up, 2, x.shape[2], "H")
    check_same_dtype(op, "w_down", w_down, "x", x)
    check_dim(op, "w_down", w_down, 3, "[E, O, I]")
    check_size(op, "w_down", w_down, 0, w_up.shape[0], "E")
    check_size(op, "w_down", w_down, 2, w_up.shape[1], "I")
    check_index(op, "input_ids", input_ids)
    check_dim(op, "input_ids", input_ids, 1, "[E]")
    check_size(op, "input_ids", input_ids, 0, w_up.shape[0], "E")
    check(
        activation in DENSE_ACTIVATIONS,
        f"{op}: activation must be one of {', '.join(DENSE_ACTIVATIONS)}, got '{activation}'.",
    )


def _check_forward(
    op: str,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> None:
    _check(op, x, w_up, w_down, input_ids, activation)
    biases = (("b_up", b_up, w_up, "[E, I]"), ("b_down", b_down, w_down, "[E, O]"))
    for name, bias, w, shape in biases:
        if bias is not None:
            check_same_dtype(op, name, bias, "x", x)
            check_dim(op, name, bias, 2, shape)
            check_size(op, name, bias, 0, w.shape[0], "E")
            check_size(op, name, bias, 1, w.shape[1], "its expert's features")
    check_same_device(
        op, x=x, w_up=w_up, w_down=w_down, input_ids=input_ids, b_up=b_up, b_down=b_down
    )


@register_fake("dense_ffn")
def _(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    _check_forward(_OP, x, w_up, w_down, input_ids, b_up, b_down, activation)
    return x.new_empty((x.shape[0], *w_down.shape[:2]))


@register_fake("dense_ffn_fwd")
def _(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    _check_forward(_OP, x, w_up, w_down, input_ids, b_up, b_down, activation)
    preact = x.new_empty(
        (w_up.shape[0], x.shape[0], w_up.shape[1]), dtype=accumulate_dtype(x.dtype)
    )
    return x.new_empty((x.shape[0], *w_down.shape[:2])), preact


def _check_backward(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    preact: Tensor,
    activation: str,
) -> None:
    op = "dense_ffn_bwd"
    _check(op, x, w_up, w_down, input_ids, activation)
    check_same_dtype(op, "grad_y", grad_y, "x", x)
    check_dim(op, "grad_y", grad_y, 3, "[T, E, O]")
    for d, n, what in ((0, x.shape[0], "T"), (1, w_up.shape[0], "E"), (2, w_down.shape[1], "O")):
        check_size(op, "grad_y", grad_y, d, n, what)
    acc = accumulate_dtype(x.dtype)
    check_float(op, "preact", preact)
    check(
        preact.dtype == acc,
        f"{op}: preact must be {dtype_name(acc)}, got {dtype_name(preact.dtype)}.",
    )
    check_dim(op, "preact", preact, 3, "[E, T, I]")
    for d, n, what in ((0, w_up.shape[0], "E"), (1, x.shape[0], "T"), (2, w_up.shape[1], "I")):
        check_size(op, "preact", preact, d, n, what)
    check_same_device(
        op, x=x, w_up=w_up, w_down=w_down, input_ids=input_ids, grad_y=grad_y, preact=preact
    )


@register_fake("dense_ffn_bwd")
def _(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    preact: Tensor,
    activation: str,
    need_x: bool,
    need_w_up: bool,
    need_w_down: bool,
    need_b_up: bool,
    need_b_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_y, x, w_up, w_down, input_ids, preact, activation)

    def made(wanted: bool, shape: tuple[int, ...]) -> Tensor:
        return x.new_empty(shape if wanted else (0,))

    return (
        made(need_x, tuple(x.shape)),
        made(need_w_up, tuple(w_up.shape)),
        made(need_w_down, tuple(w_down.shape)),
        made(need_b_up, tuple(w_up.shape[:2])),
        made(need_b_down, tuple(w_down.shape[:2])),
    )


# --- CUDA: experts first, [E, T, ...], as batched products want it


def _inputs(x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What each expert reads [E, T, H], and the number of its input."""
    ids = input_ids.long().clamp(0, max(x.shape[1] - 1, 0))
    return x.transpose(0, 1).index_select(0, ids), ids


def _products(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """[E, T, D] and [E, O, D] to [E, T, O]."""
    if bias is None:
        return torch.bmm(a, w.transpose(1, 2))
    return torch.baddbmm(bias[:, None], a, w.transpose(1, 2))


def _act(preact: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    h = preact if activation == "none" else plain_act(preact, activation)
    return h.to(dtype)


def _act_grad(grad: Tensor, preact: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, preact)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, preact)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, preact, approximate="tanh")
    if activation == "relu":
        return torch.where(preact > 0, grad, 0)
    if activation == "relu2":
        return grad * 2 * preact.clamp(min=0)
    return grad


@register_cuda_formula("dense_ffn_fwd")
def _cuda_forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    _check_forward(_OP, x, w_up, w_down, input_ids, b_up, b_down, activation)
    preact = _products(_inputs(x, input_ids)[0], w_up, b_up).to(accumulate_dtype(x.dtype))
    y = _products(_act(preact, activation, x.dtype), w_down, b_down)
    return y.transpose(0, 1).contiguous(), preact


@register_cuda_formula("dense_ffn")
def _(*args: Any) -> Tensor:
    return _cuda_forward(*args)[0]


@register_cuda_formula("dense_ffn_bwd")
def _(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    preact: Tensor,
    activation: str,
    need_x: bool,
    need_w_up: bool,
    need_w_down: bool,
    need_b_up: bool,
    need_b_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_y, x, w_up, w_down, input_ids, preact, activation)
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    inputs, ids = _inputs(x, input_ids)
    grad = grad_y.transpose(0, 1)
    grads = [x.new_empty(0) for _ in range(5)]
    if need_w_down:
        grads[2] = torch.bmm(grad.transpose(1, 2), _act(preact, activation, dtype))
    if need_b_down:
        grads[4] = grad.sum(1, dtype=acc).to(dtype)
    if need_x or need_w_up or need_b_up:
        u = _act_grad(torch.bmm(grad, w_down).to(acc), preact, activation)
        narrow = u.to(dtype)
        if need_w_up:
            grads[1] = torch.bmm(narrow.transpose(1, 2), inputs)
        if need_b_up:
            grads[3] = u.sum(1).to(dtype)
        if need_x:
            # Experts of one input are added up in their order, which index_add does not promise.
            by_input = torch.zeros((x.shape[1], x.shape[0], x.shape[2]), dtype=acc, device=x.device)
            by_input.index_put_((ids,), torch.bmm(narrow, w_up).to(acc), accumulate=True)
            grads[0] = by_input.to(dtype).transpose(0, 1).contiguous()
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_up, w_down, input_ids, _b_up, _b_down, activation = inputs
    _, preact = output
    ctx.mark_non_differentiable(preact)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_up, w_down, input_ids, preact)
    ctx.activation = activation


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    x, w_up, w_down, input_ids, preact = ctx.saved_tensors
    need_x, need_up, need_down, _ids, need_b_up, need_b_down, _name = needs_input_grad(ctx, 7)
    needs = (need_x, need_up, need_down, need_b_up, need_b_down)
    grads = torch.ops.moe_ops.dense_ffn_bwd(
        grad, x, w_up, w_down, input_ids, preact, ctx.activation, *needs
    )
    gx, g_up, g_down, gb_up, gb_down = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return gx, g_up, g_down, None, gb_up, gb_down, None


register_autograd("dense_ffn", _backward, _setup, forward="dense_ffn_fwd")
register_autograd("dense_ffn_fwd", _backward, _setup)
register_no_double_backward("dense_ffn_bwd")
register_autocast("dense_ffn", ["x", "w_up", "w_down", "b_up", "b_down"])
