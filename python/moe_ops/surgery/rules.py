"""Rules that temporarily override the routing of a model: another k, a rank, random, given sets, a
mask.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import Router, TopKRouter
from moe_ops.layers.routing import RoutingOverride, mask_logits

from .routed_layer import RoutedLayer
from .routed_layers import find_routed_layers

__all__ = ["given", "only", "random", "rank", "top_k"]

# (layer, router_logits [T, E], expert_mask [E] bool or None) -> topk_ids [T, K'].
Rule = Callable[[RoutedLayer, Tensor, Tensor | None], Tensor]
Experts = Sequence[int] | Tensor


@contextlib.contextmanager
def override_routing(
    model: nn.Module,
    rule: Rule | Mapping[str, Rule],
    *,
    layers: Sequence[str] | None = None,
    renormalize: bool = False,
) -> Iterator[list[RoutedLayer]]:
    """Overrides the expert selection of the routers of `model` while the context is open.

    Example:
        with override_routing(model, rank(2), renormalize=True):       # SCMoE's weak pass
            weak = model(tokens)
        with override_routing(model, only({"layers.0.mlp": [0, 3, 5]})):
            ...

    Only the selection changes. The router computes the weights of the selected experts with its own
    scores and normalization, and they are differentiable; shared experts are unaffected. Contexts
    may be nested; the innermost applies. `topk_ids` passed to a layer's forward take precedence.

    Eager mode only. The modules are modified, so all threads are affected.

    Args:
        model: see `find_routed_layers`, including attention experts with a router (those with
            `soft_routing` use all experts and are unaffected).
        rule: `top_k`, `rank`, `random`, `only`, `given`, or a custom function, (layer,
            router_logits [T, E], expert_mask [E] or None) -> topk_ids [T, K'] int; or a mapping
            from names of layers to rules; other layers are unchanged.
        layers: shell patterns of the names of layers to change; None is all.
        renormalize: divide a token's weights by their sum and scale them by the router's
            `routed_scaling_factor`, whether or not the router does so. If the router gives all
            selected experts weight 0, they get equal weights.

    Yields:
        The changed layers.

    Raises:
        ValueError: no routed layer, a name or pattern without a match, or a router of transformers
            with an unknown weighting method; or (in a call) more experts than a token may use.
    """
    if isinstance(rule, Mapping):
        changed = find_routed_layers(model, list(rule), caller="override_routing")
        rules = [(layer, rule[layer.name]) for layer in changed if layer.name in rule]
    else:
        changed = find_routed_layers(model, layers, caller="override_routing")
        rules = [(layer, rule) for layer in changed]
    with contextlib.ExitStack() as stack:
        for layer, own in rules:
            for index in range(len(layer.routers)):
                layer.rules(index)  # Raises before any layer is changed.
            stack.enter_context(layer.overridden(_override(layer, own, renormalize)))
        yield [layer for layer, _ in rules]


def _override(layer: RoutedLayer, rule: Rule, renormalize: bool) -> RoutingOverride:
    def choose(router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        ids = rule(layer, router_logits, expert_mask)
        if ids.dim() != 2 or ids.shape[0] != router_logits.shape[0] or ids.is_floating_point():
            raise ValueError(
                f"override_routing: the rule must give layer {layer.name!r} ids "
                f"[{len(router_logits)}, K] of an integer type, got "
                f"{str(ids.dtype).removeprefix('torch.')} of shape {list(ids.shape)}."
            )
        return ids

    return RoutingOverride(choose, renormalize)


# ------------------------------------------------------------------------------------------ rules


def top_k(k: int) -> Rule:
    """Returns a rule that selects the k experts that the router ranks first."""
    _check_positive("top_k", "k", k)

    def rule(layer: RoutedLayer, router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        return ranking(layer.rules(), router_logits, k, expert_mask)

    return rule


def rank(*ranks: int) -> Rule:
    """Returns a rule that selects the experts with these ranks, where 1 is the router's best
    expert.

    `rank(2)` is the weak routing of SCMoE for Mixtral.
    """
    if not ranks:
        raise ValueError("rank: ranks must be at least one number, got none.")
    for number in ranks:
        _check_positive("rank", "ranks", number)
    places = [number - 1 for number in ranks]

    def rule(layer: RoutedLayer, router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        return ranking(layer.rules(), router_logits, max(ranks), expert_mask)[:, places]

    return rule


def random(k: int | None = None, *, generator: torch.Generator | None = None) -> Rule:
    """Returns a rule that selects k different random experts per token; None is the router's
    `top_k`.

    Args:
        k: number of experts per token, or None.
        generator: on the device of the model; None uses torch's default generator.
    """
    if k is not None:
        _check_positive("random", "k", k)

    def rule(layer: RoutedLayer, router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        noise = torch.rand(router_logits.shape, generator=generator, device=router_logits.device)
        if expert_mask is not None:
            noise = noise.masked_fill(~expert_mask, -1.0)
        return _first(noise, layer.top_k if k is None else k)

    return rule


def only(experts: Mapping[str, Experts] | Experts) -> Rule:
    """Returns a rule that restricts routing to these experts; K shrinks only if too few are
    allowed.

    The groups of group-limited routing are kept if each has an equal number of allowed experts (or
    none), and dropped otherwise: a token might find too few experts in its groups.

    Args:
        experts: ids, or a bool mask [E], for all layers or by layer name; other layers are
            unrestricted.
    """

    def rule(layer: RoutedLayer, router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        rules = layer.rules()
        allowed = _of_layer(experts, layer)
        if allowed is None:
            return ranking(rules, router_logits, layer.top_k, expert_mask)
        mask = as_mask("only", allowed, layer, router_logits.device)
        if expert_mask is not None:
            mask = mask & expert_mask
        count = int(mask.sum())
        groups = groups_left(rules, mask.nonzero().flatten().tolist())
        if groups is not None:
            count = count // groups[0] * groups[1]
        k = min(layer.top_k, count)
        return ranking(rules, router_logits, k, mask, grouped=groups is not None)

    return rule


def given(experts: Mapping[str, Experts] | Experts) -> Rule:
    """Returns a rule that always selects these experts, for example the expert of a domain.

    Args:
        experts: ids [K'] for every token or [T, K'] for each, for all layers or by layer name;
            other layers are unchanged.
    """

    def rule(layer: RoutedLayer, router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
        ids = _of_layer(experts, layer)
        if ids is None:
            return ranking(layer.rules(), router_logits, layer.top_k, expert_mask)
        ids = torch.as_tensor(ids, device=router_logits.device)
        return ids.expand(len(router_logits), -1) if ids.dim() == 1 else ids

    return rule


# --------------------------------------------------------------------------------- what rules use


def ranking(
    router: Router,
    router_logits: Tensor,
    k: int,
    expert_mask: Tensor | None = None,
    *,
    grouped: bool = True,
) -> Tensor:
    """Returns the k experts [T, k] int that a router ranks first, best first.

    A `TopKRouter` ranks by its scores with selection bias and groups, without sampling in training
    and without capacity; other routers rank by their logits. Ties: the smaller id.

    Args:
        grouped: apply the groups of group-limited routing.

    Raises:
        ValueError: fewer than k eligible experts.
    """
    num_experts = router_logits.shape[-1]
    logits = mask_logits(router_logits, expert_mask)
    if not isinstance(router, TopKRouter):
        if k > num_experts:
            raise ValueError(f"override_routing: k must be at most {num_experts}, got {k}.")
        return _first(logits, k)
    as_k = copy.copy(router)
    as_k.top_k = k
    if not grouped:
        as_k.num_groups = as_k.num_topk_groups = 1
    most = num_experts * as_k.num_topk_groups // as_k.num_groups
    if k > most:
        raise ValueError(
            f"override_routing: k must be at most {most}, the experts that a token may use, got "
            f"{k}."
        )
    return TopKRouter.choose_experts(as_k, logits, expert_mask)[1]


def groups_left(router: Router, experts: Sequence[int]) -> tuple[int, int] | None:
    """Returns num_groups and num_topk_groups after removing all experts except `experts`; None if
    groups become invalid: uneven, too small for their score, or with too few experts for a
    token."""
    if router.num_groups == 1:
        return 1, 1
    size = router.num_experts // router.num_groups
    counts = [0] * router.num_groups
    for e in set(experts):
        counts[e // size] += 1
    left = [count for count in counts if count]
    chosen = min(router.num_topk_groups, len(left))
    least = 2 if router.group_score == "top2_sum" and len(left) > 1 else 1
    if len(set(left)) != 1 or left[0] < least or left[0] * chosen < router.top_k:
        return None
    return len(left), chosen


def _first(scores: Tensor, k: int) -> Tensor:
    if k > scores.shape[-1]:
        raise ValueError(f"override_routing: k must be at most {scores.shape[-1]}, got {k}.")
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k].to(torch.int32)


def as_mask(name: str, experts: Experts, layer: RoutedLayer, device: Any = None) -> Tensor:
    """Converts ids or a mask of experts to a mask [E] bool."""
    experts = torch.as_tensor(experts, device=device)
    num_experts = layer.num_experts
    if experts.dtype == torch.bool:
        if experts.shape != (num_experts,) or not bool(experts.any()):
            raise ValueError(
                f"{name}: a mask must be [{num_experts}] and allow an expert of layer "
                f"{layer.name!r}, got shape {list(experts.shape)}, {int(experts.sum())} allowed."
            )
        return experts
    if not experts.numel() or int(experts.min()) < 0 or int(experts.max()) >= num_experts:
        raise ValueError(
            f"{name}: experts of layer {layer.name!r} must be ids in [0, {num_experts}), got "
            f"{experts.tolist()}."
        )
    mask = torch.zeros(num_experts, dtype=torch.bool, device=device)
    mask[experts.long()] = True
    return mask


def _of_layer(experts: Any, layer: RoutedLayer) -> Any:
    return experts.get(layer.name) if isinstance(experts, Mapping) else experts


def _check_positive(name: str, argument: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")
