"""Mixture-of-experts operators for PyTorch.

``import moe_ops`` registers the ops under ``torch.ops.moe_ops`` and offers the same functions, with
their documentation, as ``moe_ops.<op>``. Layers are in :mod:`moe_ops.layers`, the Hugging Face
integration in :mod:`moe_ops.hf`, the same functions in plain torch in :mod:`moe_ops.reference`.
"""

from __future__ import annotations

__version__ = "0.1.0"

from moe_ops._threads import sleep_in_commands as _sleep_in_commands

_sleep_in_commands()

from moe_ops._load import load as _load  # noqa: E402

_load(__version__)

from moe_ops.numerics import (  # noqa: E402
    batch_invariant,
    is_batch_invariant,
    set_batch_invariant,
)
from moe_ops.ops import (  # noqa: E402
    add_rms_norm,
    dense_ffn,
    expert_choice_router,
    gated_act,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_wgrad,
    grouped_sum,
    mix_experts,
    moa_attention,
    moe_ffn,
    moe_ffn_fp8,
    moe_ffn_packed,
    moe_ffn_quantized,
    moe_linear_map,
    moe_linear_reduce,
    pack_experts,
    permute,
    quantize_fp8,
    rotary,
    router_linear,
    sort_slots,
    topk_router,
    topp_router,
    unpermute,
)
from moe_ops.packing import packed_bytes, prepack, prepacking, unpack  # noqa: E402
from moe_ops.quant import quantize_experts  # noqa: E402

__all__ = [
    "__version__",
    "add_rms_norm",
    "batch_invariant",
    "dense_ffn",
    "expert_choice_router",
    "gated_act",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_wgrad",
    "grouped_sum",
    "is_batch_invariant",
    "mix_experts",
    "moa_attention",
    "moe_ffn",
    "moe_ffn_fp8",
    "moe_ffn_packed",
    "moe_ffn_quantized",
    "moe_linear_map",
    "moe_linear_reduce",
    "pack_experts",
    "packed_bytes",
    "permute",
    "prepack",
    "prepacking",
    "quantize_experts",
    "quantize_fp8",
    "rotary",
    "router_linear",
    "set_batch_invariant",
    "sort_slots",
    "topk_router",
    "topp_router",
    "unpack",
    "unpermute",
]
