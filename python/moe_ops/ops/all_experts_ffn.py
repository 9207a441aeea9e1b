"""all_experts_ffn: every expert on every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas import all_experts_ffn as formulas
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    only_needed,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check_choice,
    check_float,
    check_index,
    check_like,
    check_positive,
    check_same_device,
    check_size,
    check_tensor,
    given,
    new_if,
)
from moe_ops.ops._library import register_cuda_formula, register_fake
from moe_ops.ops.gated_act import PLAIN_ACTIVATIONS

_all_experts_ffn = direct_call("all_experts_ffn")

DENSE_ACTIVATIONS = ("none", *PLAIN_ACTIVATIONS)


def all_experts_ffn(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Runs every expert's small two-layer MLP on every token, without routing.

    ``y[t, e] = w_down[e] @ act(w_up[e] @ x[t, input_ids[e]] + b_up[e]) + b_down[e]``. It computes
    the dense experts and towers of multi-task models, and, with ``activation="none"``, low-rank
    maps. A block of tokens stays in cache across both GEMMs, and weights are read once per block,
    so they should be small relative to the tokens. On CUDA tensors it runs two batched cuBLAS
    GEMMs.

    Args:
        x: [T, G, H], G inputs per token; float64, float32, bfloat16 or float16, any strides.
        w_up: [E, I, H] in x's dtype, any strides.
        w_down: [E, O, I] in x's dtype, any strides.
        input_ids: [E], int32 or int64 in [0, G): the input of each expert. On CUDA, where values
            cannot raise errors, ids are clamped to the range.
        b_up: [E, I] in x's dtype, or None.
        b_down: [E, O] in x's dtype, or None.
        activation: "none", "relu", "relu2", "silu", "gelu" or "gelu_tanh".

    Returns:
        [T, E, O] in x's dtype; sums and intermediate features in fp32 (fp64 for fp64). On CUDA,
        intermediate features are rounded to x's dtype.

    Raises:
        ValueError: wrong dtype, rank, size or activation, an input id out of range.
        NotImplementedError: on a second derivative.

    Source:
        Ma et al. 2018, Multi-gate Mixture-of-Experts, KDD.
    """
    return _all_experts_ffn(x, w_up, w_down, input_ids, b_up, b_down, activation)


def _check(
    op: str,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> None:
    check_float(op, "x", x, "[T, G, H]")
    check_like(op, "w_up", w_up, "x", x, "[E, I, H]")
    num_experts, width, _ = w_up.shape
    check_positive(op, num_experts=num_experts)
    check_size(op, "w_up", w_up, 2, x.shape[2], "H")
    check_like(op, "w_down", w_down, "x", x, "[E, O, I]", E=num_experts, I=width)
    check_index(op, "input_ids", input_ids, "[E]", E=num_experts)
    check_choice(op, "activation", activation, DENSE_ACTIVATIONS)
    biases = (("b_up", b_up, w_up, "[E, I]"), ("b_down", b_down, w_down, "[E, O]"))
    for name, bias, w, shape in biases:
        if bias is not None:
            check_like(op, name, bias, "x", x, shape, E=num_experts)
            check_size(op, name, bias, 1, w.shape[1], "its expert's features")
    check_same_device(
        op, x=x, w_up=w_up, w_down=w_down, input_ids=input_ids, b_up=b_up, b_down=b_down
    )


@register_fake("all_experts_ffn_fwd")
def _fake_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    _check("all_experts_ffn", *args)
    x, w_up, w_down, *_ = args
    num_tokens, (num_experts, width, _) = x.shape[0], w_up.shape
    y = x.new_empty((num_tokens, num_experts, w_down.shape[1]))
    shape = (num_experts, num_tokens, width)
    return y, x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


@register_fake("all_experts_ffn")
def _(*args: Any) -> Tensor:
    return _fake_fwd(*args)[0]


@register_fake("all_experts_ffn_bwd")
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
    op = "all_experts_ffn_bwd"
    _check(op, x, w_up, w_down, input_ids, None, None, activation)
    num_tokens, num_experts = x.shape[0], w_up.shape[0]
    sizes = {"T": num_tokens, "E": num_experts, "O": w_down.shape[1]}
    check_like(op, "grad_y", grad_y, "x", x, "[T, E, O]", **sizes)
    sizes = {"E": num_experts, "T": num_tokens, "I": w_up.shape[1]}
    check_tensor(op, "preact", preact, (accumulate_dtype(x.dtype),), "[E, T, I]", **sizes)
    check_same_device(op, x=x, grad_y=grad_y, preact=preact)
    return (
        new_if(need_x, x),
        new_if(need_w_up, w_up),
        new_if(need_w_down, w_down),
        new_if(need_b_up, w_up, w_up.shape[:2]),
        new_if(need_b_down, w_down, w_down.shape[:2]),
    )


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
    grads = torch.ops.moe_ops.all_experts_ffn_bwd(
        grad, x, w_up, w_down, input_ids, preact, ctx.activation, *needs
    )
    gx, g_up, g_down, gb_up, gb_down = only_needed(grads, needs)
    return gx, g_up, g_down, None, gb_up, gb_down, None


register_autograd("all_experts_ffn", _backward, _setup, forward="all_experts_ffn_fwd")
register_autograd("all_experts_ffn_fwd", _backward, _setup)
register_no_double_backward("all_experts_ffn_bwd")
register_autocast("all_experts_ffn", ["x", "w_up", "w_down", "b_up", "b_down"])


# --- CUDA: experts first, [E, T, ...], the layout of batched GEMMs


@register_cuda_formula("all_experts_ffn_fwd")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return formulas.forward(*args)


@register_cuda_formula("all_experts_ffn")
def _(*args: Any) -> Tensor:
    return formulas.forward(*args)[0]


@register_cuda_formula("all_experts_ffn_bwd")
def _(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return given(formulas.backward(grad_y, x, *args), x)
