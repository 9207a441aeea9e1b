"""router_linear and topk_router as one autograd node.

In a training step of a small layer, a node costs as much as the arithmetic of either op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops._private_torch import AutoDispatchBelowAutograd
from moe_ops.ops._autograd import direct_call, in_plain_training
from moe_ops.ops.router_linear import router_linear

_router_linear_bwd = direct_call("router_linear_bwd")
_topk_router = direct_call("topk_router")
_topk_router_bwd = direct_call("topk_router_bwd")


class _LinearTopk(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits_dtype: torch.dtype | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops = torch.ops.moe_ops
        with AutoDispatchBelowAutograd():
            logits = ops.router_linear(x, weight, bias, logits_dtype)
            weights, ids = ops.topk_router(logits, *options)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, logits, ids)
        ctx.options = options
        return logits, weights, ids

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logits: Tensor | None, grad_weights: Tensor | None, _: Tensor | None
    ) -> tuple[Any, ...]:
        x, weight, logits, ids = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        rest = (None,) * (1 + len(ctx.options))
        if grad_weights is not None:
            through = _topk_router_bwd(grad_weights, logits, ids, *ctx.options[1:5])
            grad_logits = through if grad_logits is None else through + grad_logits
        if grad_logits is None:
            return None, None, None, *rest
        grads = _router_linear_bwd(grad_logits, x, weight, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *rest


# Function.apply itself only checks for functorch, which in_plain_training has done.
_apply: Any = super(torch.autograd.Function, _LinearTopk).apply


def linear_topk_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits_dtype: torch.dtype | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `topk_router` of the logits from `router_linear`, for CPU tensors.

    Args:
        x, weight, bias, logits_dtype: see `router_linear`.
        options: all arguments of the op topk_router after the logits, in its order.

    Returns:
        router_logits, topk_weights and topk_ids.
    """
    if in_plain_training(x, weight, bias):
        return _apply(x, weight, bias, logits_dtype, *options)
    logits = router_linear(x, weight, bias, logits_dtype=logits_dtype)
    return logits, *_topk_router(logits, *options)
