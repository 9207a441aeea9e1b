"""DenseMixer: the router learns from all experts, although only K of them produce the output.

Scores outside the top K count as 0, and top-k selection has no derivative. The straight-through
estimate uses the identity as its derivative: the output is unchanged, and a dropped score gets the
gradient that it has if its expert enters with weight 0. This needs the outputs of all experts for
all tokens, which the backward pass computes and does not store.

Letters: T tokens, H input size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_ops.formulas.scores import router_scores

from .router import Router
from .routing import Routing, mask_logits, valid_ids

# Slots ((token, expert) pairs) that the backward pass computes at a time.
SLOTS_AT_A_TIME = 1 << 16


def check_dense_gradient(router: Router, experts: nn.Module) -> None:
    """Raises ValueError for routers and experts that the estimate does not support."""
    if type(router).weights_of is not Router.weights_of or router.apply_router_weight_on_input:
        raise ValueError(
            "MoE: router_gradient='dense' must come with a router whose weights are scores of "
            f"experts and multiply their outputs, got {type(router).__name__}."
        )
    if getattr(experts, "dispatcher", None) is not None:
        raise ValueError(
            "MoE: router_gradient='dense' must come with experts of one process, got a sharded "
            "bank."
        )


def dense_gradient_weights(
    router: Router, routing: Routing, expert_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights whose gradients are those of top-k selection with the identity as its
    derivative.

    Returns:
        topk_weights [T, K]: the values of the routing.
        other_weights [T, E]: weights of unselected experts; only their gradient is meaningful.
        other_ids [T, E] int32: the expert of each, -1 for selected and masked experts.
    """
    num_experts = router.num_experts
    scores = router_scores(mask_logits(routing.router_logits, expert_mask), router.score_func)
    valid, index = valid_ids(routing.topk_ids, num_experts)
    chosen = torch.zeros_like(scores).scatter_add(1, index, valid.to(scores.dtype)) > 0
    left_out = chosen if expert_mask is None else chosen | ~expert_mask
    ids = torch.arange(num_experts, dtype=torch.int32, device=scores.device)
    other_ids = ids.expand(scores.shape).masked_fill(left_out, -1)
    weights, others = routing.topk_weights, scores.masked_fill(left_out, 0.0)
    # The norm of the selected scores by which the weights were divided.
    p = router.renormalize_p if router.renormalize else 1.0
    if router.renormalize or (router.topk_first and router.score_func == "softmax"):
        kept = scores.detach().gather(1, index).masked_fill(~valid, 0.0)
        norm = torch.linalg.vector_norm(kept, p, dim=1, keepdim=True).clamp(min=1e-20)
        if p == 1:
            # A score at 0 adds to the sum as it grows; the derivative of other norms there is 0.
            grown = (others - others.detach()).sum(1, keepdim=True)
            weights = weights * (norm / (norm + grown)).to(weights.dtype)
        others = others / norm
    return weights, others * router.routed_scaling_factor, other_ids


def with_dense_gradient(
    y: Tensor, x: Tensor, other_weights: Tensor, other_ids: Tensor, experts: nn.Module
) -> Tensor:
    """Returns y, with <grad y[t], output of expert e for x[t]> as the gradient of `other_weights`.

    Args:
        y: [T, O], the experts' output. x: [T, H], their input.
        other_weights, other_ids: from `dense_gradient_weights`.
        experts: the experts' module.

    The gradient is not differentiable.
    """
    result: Tensor = _DenseGradient.apply(y, other_weights, x.detach(), other_ids, experts)
    return result


def _frozen(module: nn.Module) -> nn.Module:
    """Returns a copy of the module that shares memory but whose parameters need no gradient.
    Otherwise the op would compute their gradients too, and add them to those accumulated in
    place."""
    result = copy.copy(module)
    vars(result)["_parameters"] = {
        name: None if p is None else p.detach() for name, p in module._parameters.items()
    }
    vars(result)["_modules"] = {
        name: None if m is None else _frozen(m) for name, m in module._modules.items()
    }
    return result


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, other_weights: Tensor, x: Tensor, other_ids: Tensor, experts: Any
    ) -> Tensor:
        ctx.save_for_backward(x, other_ids)
        ctx.experts, ctx.dtype = experts, other_weights.dtype
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, other_ids = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        found: list[Tensor] = []
        experts = _frozen(ctx.experts)
        size = max(1, SLOTS_AT_A_TIME // other_ids.shape[1])
        for rows, ids, g in zip(
            x.split(size), other_ids.split(size), grad.split(size), strict=True
        ):
            # The gradient with respect to a slot's weight is the expert's output for the token.
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                weights = torch.ones(ids.shape, dtype=ctx.dtype, device=x.device)
                y = experts(rows, weights.requires_grad_(), ids)
            found += torch.autograd.grad(y, weights, g)
        return grad, torch.cat(found), None, None, None
