"""Configurations from which `MoE.from_config` builds a layer. They contain plain values.

Letters: H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .router import Router
from .router.options import options_of
from .router.presets import PRESETS


@dataclass(frozen=True, init=False)
class RouterConfig:
    """Class of a router and its options.

    Attributes:
        kind: name of the class: "topk" (`TopKRouter`), "topp" (`TopPRouter`), "expert_choice"
            (`ExpertChoiceRouter`), "sparsemixer" (`SparseMixerRouter`), "relu" (`ReLURouter`),
            "hash" (`HashRouter`), "capacity" (`CapacityRouter`), or the name of a custom class:
            `class MyRouter(Router, kind="mine")`.
        options: keyword arguments of that class, except device and dtype.

    Raises:
        ValueError: an unknown kind, or an option that the class does not have.
    """

    kind: str
    options: dict[str, Any]

    def __init__(self, kind: str = "topk", **options: Any) -> None:
        if kind not in Router.kinds:
            raise ValueError(
                f"RouterConfig: kind must be one of {', '.join(Router.kinds)}, got {kind!r}."
            )
        unknown = options.keys() - options_of(Router.kinds[kind]).keys()
        if unknown:
            raise ValueError(
                f"RouterConfig: options must be arguments of {Router.kinds[kind].__name__} with "
                f"kind={kind!r}, got {', '.join(sorted(unknown))}."
            )
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "options", options)

    @classmethod
    def from_model_type(cls, model_type: str, **overrides: Any) -> RouterConfig:
        """Returns the router configuration of a published model.

        Args:
            model_type: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, deepseek_v4,
                glm4_moe, granitemoe, gpt_oss, phimoe, jetmoe, dbrx or llama4 (the `model_type` of
                transformers).
            overrides: options that replace the model's.

        Differences from the models: weights are never rounded to half precision, jitter never
        changes the experts' input, experts of unselected groups are excluded instead of scored 0,
        and deepseek_v2 has no groups and scaling, which depend on the model size.

        Raises:
            ValueError: an unknown model type.
        """
        if model_type not in PRESETS:
            raise ValueError(
                f"RouterConfig.from_model_type: model_type must be one of {', '.join(PRESETS)}, "
                f"got {model_type!r}."
            )
        return cls(**{**PRESETS[model_type], **overrides})

    def build(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """Returns a new router of these sizes: H, E and K."""
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        return Router.kinds[self.kind](hidden_size, num_experts, top_k, **self.options, **where)


@dataclass(frozen=True)
class ExpertsConfig:
    """Options of `Experts` except their sizes. See `Experts` for each attribute."""

    activation: str = "swiglu"
    bias: bool = False
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    fp8_training: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and components of a `MoE` layer.

    Attributes:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E and K.
        router: configuration of the router.
        experts: options of the experts. Shared experts use their activation, without biases and in
            full precision.
        shared_intermediate_size: total width of the shared experts; 0 disables them. Two shared
            experts of width I are one network of width 2 I.
        shared_expert_gate: multiplies the shared output by a sigmoid of a linear map of x.
        latent_size: width of the routed experts' inputs and outputs, see `LatentProjection`; None
            is H.
        latent_norm: normalizes the experts' sum before it is projected back to H.
        router_gradient, aux_losses, freeze_routing_in_recompute: see `MoE`.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    shared_intermediate_size: int = 0
    shared_expert_gate: bool = False
    latent_size: int | None = None
    latent_norm: bool = False
    router_gradient: str = "topk"
    aux_losses: Sequence[str] = ()
    freeze_routing_in_recompute: bool = False
