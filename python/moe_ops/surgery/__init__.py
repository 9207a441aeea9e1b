"""Analysis and modification of trained mixture-of-experts models.

Example:
    from moe_ops import surgery

    found = surgery.profile_experts(model, batches)                    # what routers and experts do
    keep = surgery.select_experts(model, surgery.score_experts(found, "reap"), 8)
    surgery.prune_experts(model, keep)                                 # 8 experts per layer stay

    with surgery.override_routing(model, surgery.rules.rank(2)):       # another routing temporarily
        weak = model(tokens)

All functions work for the layers of `moe_ops.layers`, the language models of the zoo, and the
models of transformers that `moe_ops.hf` supports.
"""

from __future__ import annotations

from .attention_sinks import attention_sink_decay, attention_sink_mass, find_massive_activations
from .criteria import score_experts, select_experts
from .grouping import align_neurons, hc_smoe_groups, uncurl_groups
from .log_routing import log_routing
from .page import routing_data, routing_page
from .partial_loading import load_pruned
from .profile import ExpertProfile, LayerProfile, profile_experts
from .prune import ablate_experts, merge_experts, prune_experts
from .routed_layers import find_routed_layers
from .rules import override_routing
from .self_contrast import SelfContrastLogitsProcessor
from .super_experts import (
    SuperExpertReport,
    SuperExperts,
    evaluate_super_experts,
    find_super_experts,
    measure_ablation,
)
from .task_patterns import TaskRoutingPatterns
from .tuning import tune

__all__ = [
    "ExpertProfile",
    "LayerProfile",
    "SelfContrastLogitsProcessor",
    "SuperExpertReport",
    "SuperExperts",
    "TaskRoutingPatterns",
    "ablate_experts",
    "align_neurons",
    "attention_sink_decay",
    "attention_sink_mass",
    "evaluate_super_experts",
    "find_massive_activations",
    "find_routed_layers",
    "find_super_experts",
    "hc_smoe_groups",
    "load_pruned",
    "log_routing",
    "measure_ablation",
    "merge_experts",
    "override_routing",
    "profile_experts",
    "prune_experts",
    "routing_data",
    "routing_page",
    "score_experts",
    "select_experts",
    "tune",
    "uncurl_groups",
]
