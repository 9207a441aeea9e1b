"""Starts of MoE tuning that the published one is compared with: routers and experts drawn anew."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from moe_ops._fields import check_choice
from moe_ops.layers import Experts
from moe_ops.zoo.dynamicdino import DynamicDino, moe_tuning

STARTS = ("paired", "random_router", "random_experts")


def with_start(
    dense: DynamicDino,
    generator: torch.Generator | None = None,
    *,
    start: str = "paired",
    **options: Any,
) -> DynamicDino:
    """Returns a copy of a dense detector with experts.

    Args:
        generator: of all random numbers.
        start: "paired": the published initialization, which matches the dense detector;
            "random_router": slices of a copy have different rows in the router; "random_experts":
            experts are drawn too.
        options: see `DynamicDino.with_experts`.
    """
    check_choice("with_start", "start", start, STARTS)
    if start == "paired":
        return dense.with_experts(generator, **options)
    made = copy.deepcopy(dense)
    made.config = config = dataclasses.replace(dense.config, **options)
    decoder: Any = made.detector.model.decoder
    layers = decoder.layers
    for number in range(len(layers)):
        # One layer after the other, each with its own random numbers.
        decoder.layers = layers[number : number + 1]
        (moe,) = moe_tuning(
            made.detector,
            config.num_copies,
            config.num_slices,
            top_k=config.top_k,
            router_std=config.router_std,
            generator=generator,
        )
        with torch.no_grad():
            weight = moe.router.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * config.router_std)
            if start == "random_experts":
                _draw_anew(moe.experts, generator)
    decoder.layers = layers
    return made


def _draw_anew(experts: Experts, generator: torch.Generator | None) -> None:
    """Reinitializes weights like `Experts`, with biases 0."""
    for weight in (experts.w_gate_up, experts.w_down):
        bound = weight.shape[-1] ** -0.5
        weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
    for bias in (experts.b_gate_up, experts.b_down):
        if bias is not None:
            bias.zero_()
