"""Quantized experts in transformers' MoE blocks.

T tokens, H hidden size, I intermediate size, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from moe_ops import _verify as verify
from moe_ops._sharded import is_sharded
from moe_ops.expert_weights import ExpertInputs, ExpertsHook, ExpertWeights
from moe_ops.hf.experts.forward import bank_bias, bank_views
from moe_ops.hf.experts.jetmoe import MoeOpsJetMoeTopKGating
from moe_ops.hf.experts.switch import interface_of
from moe_ops.hf.models.gates import fused_activation, fused_gate
from moe_ops.ops import gated_act
from moe_ops.quant import QuantizedExperts

_UNKNOWN = "must have an activation that moe_ffn knows, got {}."


class OffloadedHfExperts(nn.Module):
    """Replaces an experts module: wraps a module with the interface of `Experts`, with
    transformers' arguments in transformers' order."""

    quantized_block = True
    format_name = "offloaded"

    def __init__(self, bank: nn.Module) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs the experts, like `experts_forward`; hidden_states may be [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y: Tensor = self.bank(x, top_k_weights, top_k_index)
        return y.view(hidden_states.shape)


class QuantizedHfExperts(QuantizedExperts):
    """Quantized experts that replace an experts module, with transformers' arguments in
    transformers' order."""

    quantized_block = True

    def stand_in(self, bank: nn.Module) -> nn.Module:
        return OffloadedHfExperts(bank)

    @property
    def qweight(self) -> Tensor:
        """Returns the quantized w_down, from which peft gets the device of a layer without
        parameters."""
        return self.w_down

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Runs the experts, like `experts_forward`; hidden_states may be [..., H]."""
        x = hidden_states.reshape(-1, self.hidden_size)
        y = self.run(x, top_k_weights, top_k_index).view(hidden_states.shape)
        if self.dispatcher is None and verify.is_due(self):
            verify.compare(
                self,
                "experts",
                y,
                lambda: self._dequantized(x, top_k_index, top_k_weights).view(y.shape),
                quantized=True,
            )
        return y

    def _dequantized(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Computes the experts with dequantized weights, one by one."""
        rows = x.float() if self.x_scale is None else x.float() * self.x_scale
        options: dict[str, Any] = {
            "interleaved": self.interleaved,
            "alpha": self.alpha,
            "limit": self.limit,
        }
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert in ids[(ids >= 0) & (ids < self.num_experts)].unique().tolist():
            token, slot = torch.where(ids == expert)
            h = F.linear(rows[token], self.weight_of("w_gate_up", expert))
            h = h if self.b_gate_up is None else h + self.b_gate_up[expert].float()
            h = gated_act(h, self.activation, **options)
            out = F.linear(h, self.weight_of("w_down", expert))
            out = out if self.b_down is None else out + self.b_down[expert].float()
            y.index_add_(0, token, out * weights[token, slot, None].float())
        return y.to(x.dtype)


class QuantizedJetMoeMoE(JetMoeMoE):
    """JetMoeMoE with `experts` in place of input_linear and output_linear."""

    quantized_block = True
    experts: QuantizedExperts

    @property
    def format_name(self) -> str:
        return self.experts.format_name

    def forward(self, layer_input: Tensor) -> Tensor:
        x = layer_input.reshape(-1, layer_input.shape[-1])
        topk_ids, _, topk_weights, _, _ = self.router(x)
        return self.experts(x, topk_weights, topk_ids).view(layer_input.shape) + self.bias


class QuantizedLlama4TextMoe(Llama4TextMoe):
    """Llama4TextMoe whose experts are a `QuantizedExperts`."""

    quantized_block = True

    @property
    def format_name(self) -> str:
        return self.experts.format_name

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        router_scores, router_logits = self.router(x)
        topk_ids = torch.topk(router_logits, self.top_k, dim=1).indices
        weights = router_scores.gather(1, topk_ids)
        y = self.experts(x, weights, topk_ids, apply_router_weight_on_input=True)
        return self.shared_expert(x) + y, router_logits


class _InterfaceExperts(ExpertsHook):
    """Hook for experts on transformers' experts interface."""

    def quantized_class(self, module: nn.Module) -> Any:
        return QuantizedHfExperts

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        interface = interface_of(module)
        if interface is None:
            return None
        if "moe_ops" not in interface:
            raise ValueError(f"must hold float experts, got {type(module).__name__}.")
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(_UNKNOWN.format("a norm behind each expert"))
        activation = fused_activation(module)
        if activation is None:
            raise ValueError(_UNKNOWN.format(f"that of {type(module).__name__}"))
        w_up, w_down = bank_views(module)
        b_up, b_down = bank_bias(module)
        return ExpertWeights((w_up,), w_down, b_up, b_down, activation)

    def install(self, root: nn.Module, module: nn.Module, experts: Any) -> nn.Module:
        called = isinstance(experts, QuantizedHfExperts)
        return super().install(root, module, experts if called else OffloadedHfExperts(experts))

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given["hidden_states"]
        x = x.reshape(-1, x.shape[-1])
        return ExpertInputs(x, given["top_k_weights"], given["top_k_index"])


class _DbrxExperts(_InterfaceExperts):
    """Hook for DbrxExperts, which store gate and up separately and w_down transposed."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        if not isinstance(module, DbrxExperts):
            return None
        shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
        mlp = module.mlp
        # These may have no such views; sharded experts are rejected by name.
        if is_sharded(mlp.w1):
            return ExpertWeights((mlp.w1, mlp.v1), mlp.w2)
        gate_up = (mlp.w1.view(shape), mlp.v1.view(shape))
        return ExpertWeights(
            gate_up, mlp.w2.view(shape).transpose(1, 2), None, None, _gate(mlp.activation_fn)
        )


class _JetMoeBlock(ExpertsHook):
    """Hook for JetMoE's feed-forward block; its attention experts are not networks."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        if not isinstance(module, JetMoeMoE) or isinstance(module, QuantizedJetMoeMoE):
            return None
        weights = (module.input_linear.weight,), module.output_linear.weight
        return ExpertWeights(*weights, None, None, _gate(module.activation))

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        (x,) = (*args, *kwargs.values())
        x = x.reshape(-1, x.shape[-1])
        router: Any = module.router  # It has one of two classes with different outputs.
        topk_logits, topk_ids = router.layer(x).float().topk(router.top_k, dim=1)
        return ExpertInputs(x, topk_logits.softmax(dim=1).type_as(x), topk_ids)

    def install(self, root: nn.Module, module: nn.Module, experts: QuantizedExperts) -> nn.Module:
        del module.input_linear, module.output_linear
        module.experts = experts
        module.router.__class__ = MoeOpsJetMoeTopKGating
        module.__class__ = QuantizedJetMoeMoE
        return root


class _Llama4Block(_JetMoeBlock):
    """Hook for Llama 4's block."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        if not isinstance(module, Llama4TextMoe) or isinstance(module, QuantizedLlama4TextMoe):
            return None
        experts = module.experts
        w_gate_up, w_down = experts.gate_up_proj, experts.down_proj
        views = (w_gate_up.transpose(1, 2),), w_down.transpose(1, 2)
        return ExpertWeights(*views, None, None, _gate(experts.act_fn))

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        (x,) = (*args, *kwargs.values())
        x = x.reshape(-1, x.shape[-1])
        router: Any = module.router
        scores, logits = router(x)
        topk_ids = torch.topk(logits, router.top_k, dim=1).indices
        return ExpertInputs(x, scores.gather(1, topk_ids), topk_ids, True)

    def install(self, root: nn.Module, module: nn.Module, experts: QuantizedExperts) -> nn.Module:
        module.experts = experts
        module.__class__ = QuantizedLlama4TextMoe
        return root


def _gate(act_fn: Any) -> dict[str, Any]:
    activation = fused_gate(act_fn)
    if activation is None:
        raise ValueError(_UNKNOWN.format(type(act_fn).__name__))
    return activation


KINDS: tuple[ExpertsHook, ...] = (
    _DbrxExperts(),
    _JetMoeBlock(),
    _Llama4Block(),
    _InterfaceExperts(),
)
