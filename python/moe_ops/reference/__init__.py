"""The ops of moe_ops in plain torch: the contract as code, and the truth the tests compare with.

Same names and arguments as the public functions. Readable before fast: differentiable by ordinary
autograd, no argument checks, and free to read offsets on the host. Half types are computed in fp32
and cast back at the end; fp64 stays fp64.
"""

from __future__ import annotations

from .add_rms_norm import add_rms_norm
from .dense_ffn import dense_ffn
from .expert_choice_router import expert_choice_router
from .gated_act import gated_act
from .grouped_gemm import grouped_gemm, grouped_gemm_wgrad, grouped_sum
from .grouped_gemm_fp8 import grouped_gemm_fp8
from .mix_experts import mix_experts
from .moa_attention import moa_attention
from .moe_ffn import moe_ffn
from .moe_ffn_fp8 import moe_ffn_fp8
from .moe_ffn_packed import moe_ffn_packed, pack_experts
from .moe_ffn_quantized import moe_ffn_quantized
from .moe_linear_map import moe_linear_map
from .moe_linear_reduce import moe_linear_reduce
from .permute import permute
from .quantize_fp8 import quantize_fp8
from .rotary import rotary
from .router_linear import router_linear
from .sort_slots import sort_slots
from .topk_router import topk_router
from .topp_router import topp_router
from .unpermute import unpermute

__all__ = [
    "add_rms_norm",
    "dense_ffn",
    "expert_choice_router",
    "gated_act",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_wgrad",
    "grouped_sum",
    "mix_experts",
    "moa_attention",
    "moe_ffn",
    "moe_ffn_fp8",
    "moe_ffn_packed",
    "moe_ffn_quantized",
    "moe_linear_map",
    "moe_linear_reduce",
    "pack_experts",
    "permute",
    "quantize_fp8",
    "rotary",
    "router_linear",
    "sort_slots",
    "topk_router",
    "topp_router",
    "unpermute",
]
