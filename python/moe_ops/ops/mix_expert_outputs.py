"""mix_expert_outputs: mixtures of all experts' outputs, with optional normalization and
activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas import mix_expert_outputs as formulas
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
    check,
    check_choice,
    check_dtype,
    check_float,
    check_like,
    check_positive,
    check_same_device,
    check_shape,
    dtype_name,
    given,
    new_if,
    new_like,
)
from moe_ops.ops._library import register_cuda_formula, register_fake

_mix_expert_outputs = direct_call("mix_expert_outputs")

MIX_ACTIVATIONS = ("none", "relu", "silu", "sigmoid")


def mix_expert_outputs(
    outputs: Tensor,
    weights: Tensor,
    *,
    factor: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes M mixtures of all experts per token: ``y[t, m] = sum_e weights[t, m, e] act(n[t,
    e])``.

    n is `outputs`, or with norm_weight and norm_bias their batch normalization, ``(outputs - mean)
    / sqrt(var + eps) * norm_weight + norm_bias``, for each feature of each expert: with the
    statistics of these tokens, which have gradients, or with given ones. Intermediate values are
    never stored; backward recomputes them. On CUDA tensors the formula is composed of torch
    operations.

    Args:
        outputs: [T, E, O], from `all_experts_ffn`; float64, float32, bfloat16 or float16, any
            strides.
        weights: [T, M, E] in the dtype of outputs, any strides. A weight of 0 does not mask: it
            gets its gradient, and 0 times NaN is NaN.
        factor: [T / r, M, O] in the dtype of outputs: y[t] is multiplied by factor[t / r], which r
            consecutive tokens share. Or None.
        norm_weight: [E, O] float32 (float64 for float64), or None: no normalization.
        norm_bias: [E, O] like norm_weight; both or neither.
        mean: [E, O] float32 (float64 for float64), constants; None: the mean of the T tokens.
        var: [E, O] like mean, the variance without Bessel's correction; both or neither.
        activation: "none", "relu", "silu" or "sigmoid".
        eps: at least 0.

    Returns:
        y [T, M, O] in the dtype of outputs; the mean and the variance (over T, without Bessel's
        correction) of the tokens, [E, O] in the dtype of norm_weight, or [0] if they were not
        computed. They have no gradient. Sums run in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank, size, activation or eps, one tensor of a pair without the
            other, a number of factor's rows that does not divide T, or statistics without
            norm_weight.
        NotImplementedError: on a second derivative.

    Source:
        Ma et al. 2018, Multi-gate Mixture-of-Experts, KDD; Wang et al. 2024, HoME, arXiv
        2408.05430.
    """
    norm = (norm_weight, norm_bias, mean, var)
    return _mix_expert_outputs(outputs, weights, factor, *norm, activation, eps)


def _check(
    op: str,
    outputs: Tensor,
    weights: Tensor,
    factor: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    activation: str,
    eps: float,
) -> None:
    check_float(op, "outputs", outputs, "[T, E, O]")
    tokens, experts, features = outputs.shape
    check_positive(op, num_experts=experts)
    check_like(op, "weights", weights, "outputs", outputs, "[T, M, E]", T=tokens, E=experts)
    check_choice(op, "activation", activation, MIX_ACTIVATIONS)
    if factor is not None:
        sizes = {"M": weights.shape[1], "O": features}
        check_like(op, "factor", factor, "outputs", outputs, "[T / r, M, O]", **sizes)
        given = factor.shape[0]
        check(
            given == 0 if tokens == 0 else given > 0 and tokens % given == 0,
            f"{op}: factor must have a number of rows that divides T = {tokens}, got shape "
            f"{list(factor.shape)}.",
        )
        check_same_device(op, outputs=outputs, factor=factor)
    named = {"norm_weight": norm_weight, "norm_bias": norm_bias, "mean": mean, "var": var}
    for first, second in (("norm_weight", "norm_bias"), ("mean", "var")):
        for there, missing in ((first, second), (second, first)):
            check(
                named[there] is None or named[missing] is not None,
                f"{op}: {missing} must come with {there}, got None.",
            )
    check(
        mean is None or norm_weight is not None,
        f"{op}: norm_weight must come with mean, got None.",
    )
    check(eps >= 0, f"{op}: eps must be at least 0, got {eps}.")
    acc, why = accumulate_dtype(outputs.dtype), f" for outputs of {dtype_name(outputs.dtype)}"
    for name, t in named.items():
        if t is not None:
            check_dtype(op, name, t.dtype, (acc,), why)
            check_shape(op, name, t, "[E, O]", E=experts, O=features)
    check_same_device(op, outputs=outputs, weights=weights, **named)


@register_fake("mix_expert_outputs")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check("mix_expert_outputs", *args)
    outputs, weights, _, norm_weight, _, mean, *_ = args
    y = outputs.new_empty((outputs.shape[0], weights.shape[1], outputs.shape[2]))
    batch = norm_weight is not None and mean is None
    norm = (outputs.shape[1:], accumulate_dtype(outputs.dtype))
    return y, new_if(batch, outputs, *norm), new_if(batch, outputs, *norm)


@register_fake("mix_expert_outputs_bwd")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "mix_expert_outputs_bwd"
    *call, _batch, need_weights, need_factor, need_norm_weight, need_norm_bias = args
    _check(op, *call)
    outputs, weights, factor, norm_weight, _, mean, *_ = call
    check(
        norm_weight is None or mean is not None,
        f"{op}: mean must come with norm_weight, got None.",
    )
    sizes = {"T": outputs.shape[0], "M": weights.shape[1], "O": outputs.shape[2]}
    check_like(op, "grad_y", grad_y, "outputs", outputs, "[T, M, O]", **sizes)
    check_same_device(op, outputs=outputs, grad_y=grad_y)
    normed, norm = norm_weight is not None, (outputs.shape[1:], accumulate_dtype(outputs.dtype))
    return (
        new_like(outputs),
        new_if(need_weights, weights),
        outputs.new_empty((0,)) if factor is None else new_if(need_factor, factor),
        new_if(need_norm_weight and normed, outputs, *norm),
        new_if(need_norm_bias and normed, outputs, *norm),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    outputs, weights, factor, norm_weight, norm_bias, mean, var, activation, eps = inputs
    _, batch_mean, batch_var = output
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)
    ctx.batch = norm_weight is not None and mean is None
    if ctx.batch:
        mean, var = batch_mean, batch_var
    ctx.save_for_backward(outputs, weights, factor, norm_weight, norm_bias, mean, var)
    ctx.activation, ctx.eps = activation, eps


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    needs = needs_input_grad(ctx, 5)
    grads = torch.ops.moe_ops.mix_expert_outputs_bwd(
        grad, *ctx.saved_tensors, ctx.activation, ctx.eps, ctx.batch, *needs[1:]
    )
    return *only_needed(grads, needs), None, None, None, None


register_autograd("mix_expert_outputs", _backward, _setup)
register_no_double_backward("mix_expert_outputs_bwd")
register_autocast("mix_expert_outputs", ["outputs", "weights", "factor"])


# --- CUDA


@register_cuda_formula("mix_expert_outputs")
def _(outputs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, *statistics = formulas.forward(outputs, *args)
    return y, *given(statistics, outputs, accumulate_dtype(outputs.dtype))


@register_cuda_formula("mix_expert_outputs_bwd")
def _(grad_y: Tensor, outputs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rows, weight, bias = formulas.backward(grad_y, outputs, *args)
    norm = given((weight, bias), outputs, accumulate_dtype(outputs.dtype))
    return *given(rows, outputs), *norm
