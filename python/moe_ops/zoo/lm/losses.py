"""Auxiliary losses of a language model: per router call, and summed over calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moe_ops.layers import Router, sequence_balance_loss
from moe_ops.layers.layer_losses import TOTAL_LOSSES
from moe_ops.layers.losses import AUX_LOSSES
from moe_ops.layers.routing import Routing


class Routed(NamedTuple):
    """Router call in a forward pass.

    layer: name of the routed module, as in `named_modules`; a chain of experts adds its iteration.
    router: the router that was called.
    routing: router_logits [T, E], topk_weights [T, K] and topk_ids [T, K].
    """

    layer: str
    router: Router
    routing: Routing


# Each takes one `Routed`, the number of sequences and a token mask; those that support tokens of
# several ranks also take `group`.
AuxLoss = Callable[..., Tensor]


def _of_layer(name: str) -> AuxLoss:
    return lambda routed, batch, mask, group=None: AUX_LOSSES[name](
        routed.router, routed.routing, mask, group
    )


def _sequence_balance(routed: Routed, batch: int, mask: Tensor | None, group: Any = None) -> Tensor:
    # These are per sequence, and no two ranks share a sequence.
    return sequence_balance_loss(
        routed.routing.router_logits,
        routed.routing.topk_ids,
        num_sequences=batch,
        score_func=routed.router.score_func,
        token_mask=mask,
    )


OF_LAYERS = {
    **{name: _of_layer(name) for name in AUX_LOSSES},
    "sequence_balance": _sequence_balance,
}


def sum_over_layers(
    name: str,
    loss: AuxLoss,
    routing: Sequence[Routed],
    batch: int,
    mask: Tensor | None,
    group: Any = None,
) -> Tensor:
    """Returns the loss summed over layers. Layers with equal routers are computed together, since a
    loss is a dozen small operations. routing: not empty."""
    together = TOTAL_LOSSES.get(name) if loss is OF_LAYERS.get(name) else None
    first = routing[0]
    score_func = getattr(first.router, "score_func", None)
    if together is None or not all(_alike(r, first) for r in routing[1:]):
        ranks = {} if group is None else {"group": group}
        parts = [loss(r, batch, mask, **ranks) for r in routing]
        return sum(parts[1:], start=parts[0])
    return together(
        [r.routing.router_logits for r in routing],
        [r.routing.topk_ids for r in routing],
        score_func=score_func,
        token_mask=mask,
        group=group,
    )


def _alike(a: Routed, b: Routed) -> bool:
    logits = a.routing.router_logits, b.routing.router_logits
    return (
        logits[0].shape == logits[1].shape
        and logits[0].dtype == logits[1].dtype
        and a.routing.topk_ids.shape == b.routing.topk_ids.shape
        and getattr(a.router, "score_func", None) == getattr(b.router, "score_func", None)
    )
