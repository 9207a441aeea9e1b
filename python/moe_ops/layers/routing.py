"""Routing of a call: the experts of each token and their weights.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Routing of T tokens, returned by routers, used by layers and stored in records.

    Attributes:
        router_logits: [T, E] as computed, before any bias or mask; differentiable. None if no
            router ran (ids and weights were given) and in a record.
        topk_weights: [T, K] fp32 (fp64 for fp64 logits); differentiable.
        topk_ids: [T, K] int32; -1 marks an empty slot, whose weight is 0.

    K is the router's `top_k`, `max_k` with kind="topp", or E with kind="expert_choice".
    """

    router_logits: Any  # Tensor or None; Any, so that callers of a router need no check.
    topk_weights: Tensor
    topk_ids: Tensor


class RoutingOverride(NamedTuple):
    """Replacement of a router's selection, set temporarily by `moe_ops.surgery.override_routing`.

    choose: (router_logits [T, E], expert_mask [E] bool or None) -> topk_ids [T, K'] int, without a
    gradient; ids outside [0, E) are empty slots. Logits of masked experts are the lowest finite
    value.
    renormalize: divide a token's weights by their sum, regardless of the router's options.
    """

    choose: Callable[[Tensor, Tensor | None], Tensor]
    renormalize: bool

    def route(
        self, router: Any, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replaces `Router.route`."""
        with torch.no_grad():
            logits = mask_logits(router_logits.detach(), expert_mask)
            ids = drop_masked(self.choose(logits, expert_mask), expert_mask)
        return router.weights_at(router_logits, ids, expert_mask=expert_mask), ids

    def weigh(self, router: Any, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Returns the final weights for the router's weights [T, K']; equal ones if the router
        gives the selected experts weight 0."""
        if not self.renormalize:
            return topk_weights
        valid = valid_ids(topk_ids, router.num_experts)[0].to(topk_weights.dtype)
        total = topk_weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, topk_weights, valid)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights * router.routed_scaling_factor


def check_given(
    name: str, topk_ids: Tensor | None, topk_weights: Tensor | None, num_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the ids and weights that a caller passes to a layer, and returns them as [T, K] each.

    Args:
        name: name of the layer, for errors.
        topk_ids, topk_weights: [..., K] for T = `num_tokens` tokens, or None.

    Raises:
        ValueError: weights without ids, or shapes that do not match.
    """
    if topk_weights is not None and topk_ids is None:
        raise ValueError(f"{name}: topk_weights must come with topk_ids, got it alone.")
    topk_ids = _flatten(name, "topk_ids", topk_ids, num_tokens)
    topk_weights = _flatten(name, "topk_weights", topk_weights, num_tokens)
    if topk_ids is not None and topk_weights is not None and topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"{name}: topk_weights must have the shape {list(topk_ids.shape)} of topk_ids, got "
            f"{list(topk_weights.shape)}."
        )
    return topk_ids, topk_weights


def _flatten(name: str, what: str, t: Tensor | None, num_tokens: int) -> Tensor | None:
    if t is None:
        return None
    if t.dim() < 2 or t.shape[:-1].numel() != num_tokens:
        raise ValueError(
            f"{name}: {what} must be [..., K] with the {num_tokens} tokens of x, got shape "
            f"{list(t.shape)}."
        )
    return t.reshape(num_tokens, t.shape[-1])


def given_routing(topk_ids: Tensor, topk_weights: Tensor, expert_mask: Tensor | None) -> Routing:
    """Returns the routing given by a caller, without logits and with masked experts dropped."""
    ids = drop_masked(topk_ids, expert_mask)
    if expert_mask is not None:
        topk_weights = topk_weights.masked_fill(ids < 0, 0.0)
    return Routing(None, topk_weights, ids)


def drop_masked(topk_ids: Tensor, expert_mask: Tensor | None) -> Tensor:
    """Returns the ids, with -1 for experts masked by expert_mask [E] and for ids outside [0, E)."""
    if expert_mask is None:
        return topk_ids
    num_experts = expert_mask.shape[0]
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    allowed = expert_mask[torch.where(valid, topk_ids, 0).long()]
    return topk_ids.masked_fill(~(valid & allowed), -1)


def mask_logits(router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
    """Masks the logits [T, E] of experts that expert_mask [E] does not allow."""
    if expert_mask is None:
        return router_logits
    num_experts = router_logits.shape[-1]
    if expert_mask.dtype != torch.bool or expert_mask.shape != (num_experts,):
        raise ValueError(
            f"Router: expert_mask must be bool [{num_experts}], got "
            f"{str(expert_mask.dtype).removeprefix('torch.')} of shape {list(expert_mask.shape)}."
        )
    # The lowest finite number, not -inf: if every expert is masked, softmax and its gradient stay
    # finite, and the weights are zeroed afterwards.
    return router_logits.masked_fill(~expert_mask, torch.finfo(router_logits.dtype).min)


def valid_ids(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns a bool mask of the nonempty slots, and int64 ids for indexing, 0 in the empty
    slots."""
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    return valid, torch.where(valid, ids, 0)
