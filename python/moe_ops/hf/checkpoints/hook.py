"""The hook through which packing and quantization find transformers' MoE blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_ops.expert_weights import ExpertInputs, ExpertsHook, ExpertWeights
from moe_ops.hf.checkpoints.quantizer import METHOD, mark_layers, mark_quantized, refuse_to_save
from moe_ops.hf.experts.switch import status_of


class TransformersHook(ExpertsHook):
    """All blocks that :mod:`moe_ops.hf` supports, switched to moe_ops or not."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        for kind in _kinds():
            if (weights := kind.weights(module)) is not None:
                return weights
        return None

    def reads_packed(self, module: nn.Module) -> bool:
        return status_of(module) == "moe_ops"

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        return _kind_of(module).inputs(module, args, kwargs)

    def quantized_class(self, module: nn.Module) -> Any:
        return _kind_of(module).quantized_class(module)

    def install(self, root: nn.Module, module: nn.Module, experts: Any) -> nn.Module:
        return _kind_of(module).install(root, module, experts)

    def check_root(self, root: nn.Module) -> None:
        if isinstance(root, PreTrainedModel) and _method_of(root) == METHOD:
            # A checkpoint has room for one format.
            raise ValueError("quantize: model must be a float model, got one quantized by moe_ops.")

    def mark_quantized(
        self,
        root: nn.Module,
        format: str,
        x_scale: bool,
        skip: Sequence[str],
    ) -> None:
        if not isinstance(root, PreTrainedModel):
            return
        if _method_of(root) is None:
            mark_quantized(root, format, x_scale, skip)
        else:
            refuse_to_save(root)

    def mark_dense(self, root: nn.Module) -> None:
        if isinstance(root, PreTrainedModel):
            if _method_of(root) in (None, METHOD):
                mark_layers(root)
            else:
                refuse_to_save(root)


def _method_of(root: nn.Module) -> str | None:
    method = getattr(root, "quantization_method", None)
    return getattr(method, "value", method)


def _kinds() -> Sequence[ExpertsHook]:
    # It imports the models whose blocks it subclasses, which most processes have no use for.
    from moe_ops.hf.experts.quantized import KINDS

    return KINDS


def _kind_of(module: nn.Module) -> ExpertsHook:
    return next(kind for kind in _kinds() if kind.weights(module) is not None)
