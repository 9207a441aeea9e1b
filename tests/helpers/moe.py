"""MoE layers and routers from flat options, as parametrized tests name them."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_ops.layers import ExpertsConfig, MoE, MoEConfig, Router, RouterConfig

_EXPERTS = {f.name for f in dataclasses.fields(ExpertsConfig)}
_LAYER = {f.name for f in dataclasses.fields(MoEConfig)}


def build_moe(
    *sizes: int, router: str | None = None, device=None, dtype=None, **options: Any
) -> MoE:
    """Returns a MoE layer; each option goes to the config that has it, others to the router's.

    Args:
        sizes: H, I, E and K, or give them by name.
        router: a model type, whose routing the layer has.
        options: of the configs; `num_shared_experts` shared experts of width I, and `router_bias`
            for the router's bias, since `bias` is the experts'.
    """
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    options = dict(zip(names, sizes, strict=False)) | options
    shared = options.pop("num_shared_experts", 0)
    if shared:
        options["shared_intermediate_size"] = shared * options["intermediate_size"]
    layer = {name: options.pop(name) for name in list(options) if name in _LAYER}
    experts = {name: options.pop(name) for name in list(options) if name in _EXPERTS}
    if "router_bias" in options:
        options["bias"] = options.pop("router_bias")
    made = RouterConfig.from_model_type(router, **options) if router else RouterConfig(**options)
    config = MoEConfig(router=made, experts=ExpertsConfig(**experts), **layer)
    return MoE.from_config(config, device=device, dtype=dtype)


def build_router(
    hidden_size: int, num_experts: int, top_k: int, *, device=None, dtype=None, **options: Any
) -> Router:
    """Returns a router of `kind` ("topk" unless given) with these options."""
    config = RouterConfig(**options)
    return config.build(hidden_size, num_experts, top_k, device=device, dtype=dtype)
