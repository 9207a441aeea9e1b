"""Export to ONNX: the ops as standard ONNX operators, so that a file runs without this package.

Example:
    table = moe_ops.onnx.translation_table()
    program = torch.onnx.export(model, (x,), dynamo=True, custom_translation_table=table)

onnxruntime, and whatever else reads ONNX (opset 18), then computes what the model does in
inference. Products run over each expert's tokens alone: the slots are sorted by expert and a
product an expert multiplies its rows, so that the work is that of top-k and not of all experts. The
number of tokens may be dynamic. Sums run in float32 whatever the type of the operands.

Needs onnxscript, as torch.onnx.export does: ``pip install torch-moe-ops[onnx]``.
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

# Ops of inference; the others are refused by torch.onnx.export, which names them. fp8 weights and
# packed ones are of kernels, and the ops of a decoding step write into a cache.
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
    """The `custom_translation_table` of torch.onnx.export(..., dynamo=True) for models that call
    the ops of this package, by its layers or directly.

    Returns:
        A new dict, op -> what builds its part of the graph: of topk_router, topp_router,
        expert_choice_router, router_linear, sort_by_expert, permute, unpermute, grouped_gemm,
        grouped_gemm_quantized, gated_act, moe_ffn, moe_ffn_quantized (int8 and int4, dequantized in
        the graph), moe_linear_map, moe_linear_reduce, moa_attention, rotary, add_rms_norm,
        peer_ffn, all_experts_ffn and mix_expert_outputs. In float32, bfloat16 and float16; float64
        is refused.

    NaN logits are not ranked as the ops rank them.
    """
    return {
        getattr(torch.ops.moe_ops, op).default: _translation(op, build)
        for op, build in _TRANSLATIONS.items()
    }


def _translation(op: str, build: Callable[..., Any]) -> Callable[..., Any]:
    # Without annotations, of which torch would read what is an attribute.
    def translate(*args, **kwargs):  # type: ignore[no-untyped-def]
        refuse_float64(op, (*args, *kwargs.values()))
        return build(*args, **kwargs)

    translate.__name__ = op
    return translate
