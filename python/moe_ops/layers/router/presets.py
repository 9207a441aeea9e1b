"""Router options of published models, from the modeling code of transformers.

Options that depend on the model size rather than on the routing method (for example, the number of
groups of DeepSeek-V2) are left to the caller.
"""

from __future__ import annotations

from typing import Any

import torch

PRESETS: dict[str, dict[str, Any]] = {
    "mixtral": {"renormalize": True},
    "qwen2_moe": {},
    "qwen3_moe": {"renormalize": True},
    "olmoe": {},
    "deepseek_v2": {"logits_dtype": torch.float32},
    "deepseek_v3": {
        "score_func": "sigmoid",
        "renormalize": True,
        "routed_scaling_factor": 2.5,
        "expert_bias": True,
        "num_groups": 8,
        "num_topk_groups": 4,
        "group_score": "top2_sum",
        "logits_dtype": torch.float32,
    },
    "deepseek_v4": {
        "score_func": "sqrtsoftplus",
        "renormalize": True,
        "routed_scaling_factor": 1.5,
        "expert_bias": True,
    },
    "glm4_moe": {
        "score_func": "sigmoid",
        "renormalize": True,
        "expert_bias": True,
        "group_score": "top2_sum",
        "logits_dtype": torch.float32,
    },
    "granitemoe": {"topk_first": True},
    "gpt_oss": {"topk_first": True, "bias": True},
    "phimoe": {"kind": "sparsemixer", "sparsemixer_eps": 0.01},
    "jetmoe": {"topk_first": True},
    "dbrx": {"renormalize": True, "renormalize_p": 1.0},
    "llama4": {
        "score_func": "sigmoid",
        "topk_first": True,
        "apply_router_weight_on_input": True,
    },
}
