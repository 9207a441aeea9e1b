"""Models of the tests of DeepSeekMoE."""

from __future__ import annotations

from moe_ops import zoo
from moe_ops.layers.rotary import Yarn
from moe_ops.zoo.deepseek import DeepSeek

from ..lm.common import sharpen

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "dense_intermediate_size": 24, "intermediate_size": 20,
    "num_experts": 8, "top_k": 3, "num_heads": 4,
}  # fmt: skip

YARN = Yarn(4.0, 16, mscale=0.7, mscale_all_dim=0.9)

VARIANTS = {
    "v1": ("tiny_v1", {}),
    "v2": ("tiny_v2", {}),
    "v2_yarn": ("tiny_v2", {"yarn": YARN, "q_rank": None, "num_groups": 1, "num_topk_groups": 1}),
    "v3": ("tiny", {}),
    "v3_yarn": ("tiny", {"yarn": YARN, "q_rank": 16, "num_shared_experts": 2}),
    "v3_halves": ("tiny", {"rope_interleaved": False}),
}


def config_of(variant):
    preset, changes = VARIANTS[variant]
    return zoo.get("deepseek").make_config(preset, **SMALL, **changes)


def build(variant):
    return sharpen(DeepSeek(config_of(variant))).double()
