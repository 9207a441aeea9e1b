"""The base class of the methods of experts, and the method of float weights.

A method creates the parameters that vLLM's loader fills, in the layout of the checkpoint, turns
them into what moe_ops reads when all are there, and computes a batch. The parameters are those of
vLLM's own methods, whose constructors are not called: they look for a kernel of vLLM and raise an
error where there is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

import moe_ops
import moe_ops_vllm

ACTIVATIONS = {
    MoEActivation.SILU: "swiglu",
    MoEActivation.GELU: "geglu",
    MoEActivation.GELU_TANH: "geglu_tanh",
    MoEActivation.SWIGLUOAI: "swiglu_oai",
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: "swiglu_oai",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}


class StaysWithVllm(Exception):
    """The reason why a layer is left to vLLM, as the end of a sentence."""


def activation_for(layer: nn.Module, activation: MoEActivation) -> str:
    """Returns the name that moe_ops has for the activation of a layer, with its limits.

    Raises:
        StaysWithVllm: moe_ops does not have it.
    """
    if activation not in ACTIVATIONS:
        raise StaysWithVllm(f"moe_ops has no activation {activation.value}")
    name = ACTIVATIONS[activation]
    alpha, beta = layer.swiglu_alpha, layer.swiglu_beta
    if name == "swiglu_oai":
        if beta not in (None, 1.0):
            raise StaysWithVllm(f"swigluoai must add 1 to the up half, got {beta}")
    elif alpha not in (None, 1.0) or beta not in (None, 0.0):
        raise StaysWithVllm(f"{activation.value} must have alpha 1 and beta 0, got {alpha}, {beta}")
    elif layer.swiglu_limit is not None:
        if name != "swiglu":
            raise StaysWithVllm(f"{activation.value} of this model has a limit")
        return "swiglu_clamped"
    return name


class MoeOpsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The base class of methods. Subclasses create parameters and define `finish` and `compute`."""

    label: str  # the format of the weights, for the log
    activation: str  # as moe_ops calls it, once weights are loaded

    # vLLM's methods answer these by the kernel that they have chosen.
    is_monolithic = False
    supports_eplb = False
    skip_forward_padding = False
    has_unpadded_output = False
    topk_indices_dtype = torch.int32
    maybe_roundup_sizes = FusedMoEMethodBase.maybe_roundup_sizes

    def finish(self, layer: nn.Module) -> None:
        """Turns the parameters that vLLM has loaded into those that `compute` reads."""
        raise NotImplementedError

    def compute(
        self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, **options: Any
    ) -> Tensor:
        """Returns the sum of the experts' outputs [T, H] for rows x [T, H], routing weights [T, K]
        and local ids [T, K], in which -1 is an expert of another rank."""
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.finish(layer)
        self.activation = activation_for(layer, layer.activation)

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Computes routed experts; vLLM's runner computes shared ones before it calls this."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()].to(torch.int32)
        options: dict[str, Any] = {
            "b_gate_up": getattr(layer, "w13_bias", None),
            "b_down": getattr(layer, "w2_bias", None),
            "activation": self.activation,
            "interleaved": layer.activation == MoEActivation.SWIGLUOAI,
            "apply_router_weight_on_input": layer.apply_router_weight_on_input,
        }
        if self.activation == "swiglu_oai" and layer.swiglu_alpha is not None:
            options["alpha"] = layer.swiglu_alpha
        if layer.swiglu_limit is not None:
            options["limit"] = layer.swiglu_limit
        return self.compute(layer, x, topk_weights, topk_ids, **options)


class Unquantized(MoeOpsMethod, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """float32, bfloat16 and float16 weights: vLLM's parameters, then packed copies alone.

    What remains of a parameter is a view of one element, which has its shape. The method keeps it,
    because vLLM's reload copies into every parameter that a layer has.
    """

    def __init__(self, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.label = str(moe.in_dtype).removeprefix("torch.")
        self.shapes: dict[str, Tensor] = {}

    def finish(self, layer: nn.Module) -> None:
        halves = layer.activation.is_gated and layer.activation != MoEActivation.SWIGLUOAI
        for name, split in (("w13_weight", halves), ("w2_weight", False)):
            weight = getattr(layer, name).data
            packed = moe_ops.pack_experts(weight, halves=split)
            self.shapes[name] = weight.new_empty(()).expand(weight.shape)
            delattr(layer, name)
            replace(layer, f"{name}_panels", packed)

    def compute(
        self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, **options: Any
    ) -> Tensor:
        return moe_ops.moe_ffn_packed(
            x,
            self.shapes["w13_weight"],
            self.shapes["w2_weight"],
            layer.w13_weight_panels,
            layer.w2_weight_panels,
            weights,
            ids,
            packed_only=True,
            **options,
        )


def mark(config: VllmConfig) -> None:
    """Adds the plugin to the configuration, by a hash of which compiled graphs are cached."""
    if isinstance(config.additional_config, dict):
        versions = f"{moe_ops.__version__} {moe_ops_vllm.__version__}"
        mode = " batch-invariant" * moe_ops.is_batch_invariant_enabled()
        config.additional_config.setdefault("moe_ops", versions + mode)


def replace(layer: nn.Module, name: str, value: Tensor | None) -> None:
    """Gives a layer a parameter without a gradient in the place of what has that name."""
    if hasattr(layer, name):
        delattr(layer, name)
    kept = None if value is None else nn.Parameter(value, requires_grad=False)
    layer.register_parameter(name, kept)
