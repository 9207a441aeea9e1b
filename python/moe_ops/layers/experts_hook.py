"""The view of `Experts` for packing and quantization."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ops.expert_weights import ExpertInputs, ExpertsHook, ExpertWeights, register_hook

from .experts import Experts, activation_of


class _ExpertsHook(ExpertsHook):
    """Hook for `Experts` with equal input and output sizes."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        if not isinstance(module, Experts) or module.output_size != module.hidden_size:
            return None
        experts: Any = module
        biases = experts.b_gate_up, experts.b_down
        return ExpertWeights((experts.w_gate_up,), experts.w_down, *biases, activation_of(experts))

    def reads_packed(self, module: nn.Module) -> bool:
        return (
            isinstance(module, Experts)
            and module.output_size == module.hidden_size
            and not module.fp8_training
        )

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        names = ("x", "topk_weights", "topk_ids")
        return ExpertInputs(**{**dict(zip(names, args, strict=False)), **kwargs})


register_hook(_ExpertsHook())
