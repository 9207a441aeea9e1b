"""Documented Python functions of the ops, one file per op, with its fake, autograd and autocast
rules."""

from moe_ops.ops import _flops, _library, _moe_ffn_lora, _vmap  # noqa: F401  They register ops.
from moe_ops.ops.add_rms_norm import add_rms_norm
from moe_ops.ops.all_experts_ffn import all_experts_ffn
from moe_ops.ops.attention_decode import attention_decode
from moe_ops.ops.dispatch_layout import dispatch_layout
from moe_ops.ops.expert_choice_router import expert_choice_router
from moe_ops.ops.gated_act import gated_act
from moe_ops.ops.gated_mlp_decode import gated_mlp_decode
from moe_ops.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad, grouped_sum
from moe_ops.ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_wgrad
from moe_ops.ops.grouped_gemm_quantized import grouped_gemm_quantized
from moe_ops.ops.mix_expert_outputs import mix_expert_outputs
from moe_ops.ops.mla_decode import mla_decode
from moe_ops.ops.moa_attention import moa_attention
from moe_ops.ops.moe_ffn import moe_ffn
from moe_ops.ops.moe_ffn_fp8 import moe_ffn_fp8
from moe_ops.ops.moe_ffn_packed import moe_ffn_packed, pack_experts
from moe_ops.ops.moe_ffn_quantized import moe_ffn_quantized
from moe_ops.ops.moe_linear_map import moe_linear_map
from moe_ops.ops.moe_linear_reduce import moe_linear_reduce
from moe_ops.ops.peer_ffn import peer_ffn
from moe_ops.ops.permute import permute
from moe_ops.ops.quantize_fp8 import quantize_fp8, quantize_fp8_columns
from moe_ops.ops.rotary import rotary
from moe_ops.ops.router_linear import router_linear
from moe_ops.ops.sort_by_expert import sort_by_expert
from moe_ops.ops.topk_router import topk_router
from moe_ops.ops.topp_router import topp_router
from moe_ops.ops.unpermute import unpermute

for _name in _library.fakes:
    _vmap.register_rule(_name)

__all__ = [
    "add_rms_norm",
    "all_experts_ffn",
    "attention_decode",
    "dispatch_layout",
    "expert_choice_router",
    "gated_act",
    "gated_mlp_decode",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_wgrad",
    "grouped_gemm_quantized",
    "grouped_gemm_wgrad",
    "grouped_sum",
    "mix_expert_outputs",
    "mla_decode",
    "moa_attention",
    "moe_ffn",
    "moe_ffn_fp8",
    "moe_ffn_packed",
    "moe_ffn_quantized",
    "moe_linear_map",
    "moe_linear_reduce",
    "pack_experts",
    "peer_ffn",
    "permute",
    "quantize_fp8",
    "quantize_fp8_columns",
    "rotary",
    "router_linear",
    "sort_by_expert",
    "topk_router",
    "topp_router",
    "unpermute",
]
