"""Export to ONNX: the ops as standard ONNX operators, so that a file runs without this package.

Example:
    table = moe_ops.onnx.translation_table()
    program = torch.onnx.export(model, (x,), dynamo=True, custom_translation_table=table)

onnxruntime, and other consumers of ONNX (opset 18), then compute the model's inference. Slots are
sorted by expert, and one GEMM per expert multiplies its rows, so the cost is that of top-k and not
of all experts. The number of tokens may be dynamic. Sums run in float32 for all operand dtypes.

Needs onnxscript, like torch.onnx.export: ``pip install torch-moe-ops[onnx]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import moe_ops.ops  # noqa: F401  # It registers them.

try:
    import onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        "moe_ops.onnx needs onnxscript, which is not installed: pip install torch-moe-ops[onnx]"
    ) from error

from . import attention, experts, products, routing
from .values import refuse_float64

__all__ = ["translation_table"]

# Inference ops; torch.onnx.export rejects others by name. fp8 and packed weights are specific to
# kernels, and the decode ops write into a cache.
_TRANSLATIONS: dict[str, Callable[..., Any]] = {
    "add_rms_norm": attention.add_rms_norm,
    "all_experts_ffn": experts.all_experts_ffn,
    "expert_choice_router": routing.expert_choice_router,
    "gated_act": experts.gated_act,
    "grouped_gemm": products.grouped_gemm,
    "grouped_gemm_quantized": products.grouped_gemm_quantized,
    "mix_expert_outputs": experts.mix_expert_outputs,
    "moa_attention": attention.moa_attention,
    "moe_ffn": experts.moe_ffn,
    "moe_ffn_quantized": experts.moe_ffn_quantized,
    "moe_linear_map": products.moe_linear_map,
    "moe_linear_reduce": products.moe_linear_reduce,
    "peer_ffn": experts.peer_ffn,
    "permute": products.permute,
    "rotary": attention.rotary,
    "router_linear": routing.router_linear,
    "sort_by_expert": routing.sort_by_expert,
    "topk_router": routing.topk_router,
    "topp_router": routing.topp_router,
    "unpermute": products.unpermute,
}


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Returns the `custom_translation_table` of torch.onnx.export(..., dynamo=True) for models that
    call the ops of this package, through layers or directly.

    Returns:
        A new dict, op -> function that builds its part of the graph: for topk_router, topp_router,
        expert_choice_router, router_linear, sort_by_expert, permute, unpermute, grouped_gemm,
        grouped_gemm_quantized, gated_act, moe_ffn, moe_ffn_quantized (int8 and int4, dequantized in
        the graph), moe_linear_map, moe_linear_reduce, moa_attention, rotary, add_rms_norm,
        peer_ffn, all_experts_ffn and mix_expert_outputs, in float32, bfloat16 and float16; float64
        is rejected.

    NaN logits are ranked differently than in the ops.
    """
    return {
        getattr(torch.ops.moe_ops, op).default: _translation(op, build)
        for op, build in _TRANSLATIONS.items()
    }


def _translation(op: str, build: Callable[..., Any]) -> Callable[..., Any]:
    # Without annotations, from which torch would derive attributes.
    def translate(*args, **kwargs):  # type: ignore[no-untyped-def]
        refuse_float64(op, (*args, *kwargs.values()))
        return build(*args, **kwargs)

    translate.__name__ = op
    return translate
