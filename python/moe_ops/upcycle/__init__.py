"""Upcycling of dense models: experts initialized from trained feed-forward networks and attention.

Example:
    from moe_ops import upcycle

    layer = upcycle.upcycle_ffn(mlp, num_experts=8, top_k=2)          # copies of one network
    layer = upcycle.upcycle_ffn(mlp, 32, 8, num_slices=4)             # copies cut into slices
    layer = upcycle.upcycle_ffn([code, law, maths], 3, 1)             # specialists
    model = upcycle.upcycle_model(llama, 8, 2)                        # LlamaForCausalLM -> Mixtral

Layers are those of `moe_ops.layers`; `upcycle_model` takes and returns models of transformers.
"""

from __future__ import annotations

from .attention import upcycle_attention
from .experts import copy_experts, experts_from_dense, slice_experts
from .layer import paired_router, upcycle_ffn
from .models import upcycle_model
from .neurons import coactivation_order, k_means_order

__all__ = [
    "coactivation_order",
    "copy_experts",
    "experts_from_dense",
    "k_means_order",
    "paired_router",
    "slice_experts",
    "upcycle_attention",
    "upcycle_ffn",
    "upcycle_model",
]
