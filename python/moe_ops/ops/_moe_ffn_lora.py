"""moe_ffn_lora: moe_ffn of frozen weights with low-rank terms (LoRA), on the CPU.

`moe_ops.layers.expert_adapters` calls it and documents its operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import FLOATS, accumulate_dtype, check_tensor, new_if, new_like
from moe_ops.ops._library import register_fake

_FWD, _BWD = "moe_ffn_lora_fwd", "moe_ffn_lora_bwd"
_bwd = direct_call(_BWD)

# Positions of the arguments that have gradients: x, topk_weights and the four factors.
_WITH_GRADIENT = (0, 10, 12, 13, 14, 15)
_COUNT = 25


@register_fake(_FWD)
def _(*args: Any) -> tuple[Tensor, ...]:
    x, w_gate_up, w_down, topk_ids = args[0], args[1], args[4], args[11]
    num_adapters, training = args[18], args[24]
    check_tensor(_FWD, "x", x, FLOATS, "[T, H]")
    tokens, top_k = topk_ids.shape
    ranks = [0 if factor is None else factor.shape[1] for factor in (args[12], args[14])]
    groups = w_down.shape[0] * max(num_adapters, 1)
    return (
        new_like(x),
        x.new_empty((tokens * top_k if training else 0, w_gate_up.shape[1])),
        *(x.new_empty((tokens * top_k, r), dtype=accumulate_dtype(x.dtype)) for r in ranks),
        x.new_empty((groups + 1,), dtype=torch.int32),
        x.new_empty((tokens * top_k,), dtype=torch.int32),
        x.new_empty((tokens, top_k), dtype=torch.int32),
    )


@register_fake(_BWD)
def _(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    factors, slot_to_row, needs = args[10:14], args[22], args[28:34]
    wide = accumulate_dtype(x.dtype)
    shapes = [None if factor is None else tuple(factor.shape) for factor in factors]
    return (
        new_if(needs[0], x),
        new_if(needs[1], x, tuple(slot_to_row.shape), wide),
        *(new_if(need, x, shape, wide) for need, shape in zip(needs[2:], shapes, strict=True)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs = needs_input_grad(ctx, _COUNT)
    if any(need for i, need in enumerate(needs) if i not in _WITH_GRADIENT):
        raise NotImplementedError(
            f"{_FWD}: weights, scales and biases have no gradient, but one of them requires it."
        )
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    tensors = (*inputs[:7], *inputs[8:11], *inputs[12:16], inputs[17])
    ctx.save_for_backward(*tensors, *saved)
    ctx.format, ctx.scaling, ctx.num_adapters = inputs[7], inputs[16], inputs[18]
    ctx.options = inputs[19:24]


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * _COUNT
    if grad_y is None:
        return tuple(grads)
    saved = ctx.saved_tensors
    weights, others, factors, adapter_ids = saved[:7], saved[7:10], saved[10:14], saved[14]
    needs = [needs_input_grad(ctx, _COUNT)[i] for i in _WITH_GRADIENT]
    found = _bwd(
        grad_y,
        *weights,
        ctx.format,
        *others,
        *factors,
        ctx.scaling,
        adapter_ids,
        ctx.num_adapters,
        *saved[15:],
        *ctx.options,
        *needs,
    )
    inputs = (weights[0], others[2], *factors)
    for i, need, grad, like in zip(_WITH_GRADIENT, needs, found, inputs, strict=True):
        grads[i] = grad.to(like.dtype) if need else None
    return tuple(grads)


register_autograd(_FWD, _backward, _setup)
register_no_double_backward(_BWD)
