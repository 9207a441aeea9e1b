"""Attention experts initialized from dense attention.

Letters: H hidden size, E experts, n query heads, m key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import AttentionExperts, Router

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def upcycle_attention(
    attentions: Sequence[nn.Module],
    router: Router,
    *,
    rope_theta: float | None,
    expert_kv: bool = True,
    soft_routing: bool = True,
    **options: Any,
) -> AttentionExperts:
    """Creates one attention expert per dense attention: BAM's initialization.

    If the experts are equal and routing weights sum to 1 (soft routing, or a router that
    renormalizes), the layer computes the function of the dense attention, up to rounding. With m <
    n, each key-value head is repeated for the n / m query heads that read it, because an expert has
    equal numbers of both.

    Args:
        attentions: E modules of equal shapes with linear maps q_proj [n d, H], k_proj and v_proj [m
            d, H] and o_proj [H, n d] without biases, and `head_size` or `head_dim`; without norms
            of queries and keys.
        router: router of E experts.
        rope_theta: base of the rotary embeddings of the dense attention; None without.
        expert_kv: each expert keeps its keys and values; False: the layer uses their mean.
        soft_routing: see `AttentionExperts`.
        options: other arguments of `AttentionExperts`.

    Raises:
        ValueError: a number of modules that differs from the router's experts, or unsupported
            modules.

    Source: Zhang et al. 2024 (BAM, arXiv 2408.08274).
    """
    modules = list(attentions)
    if len(modules) != router.num_experts:
        raise ValueError(
            f"upcycle_attention: attentions must be {router.num_experts} like the router's "
            f"experts, got {len(modules)}."
        )
    parts = [_projections(module) for module in modules]
    size = parts[0][1]
    shapes = {(tuple(w[name].shape for name in _NAMES), d) for w, d in parts}
    if len(shapes) != 1 or parts[0][0]["q_proj"].shape[1] != router.hidden_size:
        raise ValueError(
            "upcycle_attention: attentions must be of one shape and read the hidden_size = "
            f"{router.hidden_size} of the router, got {len(shapes)} shapes."
        )
    stacked = {name: torch.stack([w[name] for w, _ in parts]) for name in _NAMES}
    heads = stacked["q_proj"].shape[1] // size
    kv = [_repeated(stacked[name], size, heads) for name in ("k_proj", "v_proj")]
    where: dict[str, Any] = {"device": kv[0].device, "dtype": kv[0].dtype}
    layer = AttentionExperts(
        router,
        heads,
        size,
        rope_theta=rope_theta,
        soft_routing=soft_routing,
        expert_kv=expert_kv,
        **options,
        **where,
    )
    layer.w_query.copy_(stacked["q_proj"])
    layer.w_output.copy_(stacked["o_proj"])
    shared = [w.flatten(0, 1) if expert_kv else mean_of(list(w)) for w in kv]
    layer.kv_proj.weight.copy_(torch.cat(shared))
    return layer


def _projections(module: Any) -> tuple[dict[str, Tensor], int]:
    found: dict[str, Tensor] = {}
    for name in _NAMES:
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            found[name] = linear.weight.detach()
    size = getattr(module, "head_size", getattr(module, "head_dim", None))
    if len(found) < len(_NAMES) or size is None or hasattr(module, "q_norm"):
        raise ValueError(
            "upcycle_attention: attentions must have q_proj, k_proj, v_proj and o_proj without "
            f"biases, a head_size and no norms of queries, got {type(module).__name__}."
        )
    return found, int(size)


def _repeated(w: Tensor, size: int, heads: int) -> Tensor:
    """Repeats heads: [E, n d, H] from [E, m d, H]."""
    by_head = w.unflatten(1, (-1, size))
    return by_head.repeat_interleave(heads // by_head.shape[1], dim=1).flatten(1, 2)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a new tensor with the mean, computed in at least fp32, in the dtype of the first;
    exact for equal tensors."""
    first = tensors[0]
    acc = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(acc, copy=True)
    for i, tensor in enumerate(tensors[1:], start=2):
        total = total + (tensor.to(total) - total) / i
    return total.to(first.dtype)
