"""Looking into trained mixture-of-experts models, and changing them.

    from moe_ops import surgery

    found = surgery.profile(model, batches)                    # what routers and experts do
    keep = surgery.choose_experts(model, surgery.scores(found, "reap"), 8)
    surgery.prune(model, keep)                                 # 8 experts a layer are left

    with surgery.route_as(model, surgery.rank(2)):             # another routing for a while
        weak = model(tokens)

All of it works for the layers of `moe_ops.layers`, the language models of the zoo, and the models
of transformers that `moe_ops.hf` serves.
"""

from __future__ import annotations

from .attention_sinks import MassiveActivation, massive_activations, sink_decay, sink_mass
from .criteria import CRITERIA, choose_experts, scores
from .grouping import align, hc_smoe_groups, uncurl_groups
from .log_routing import log_routing
from .page import routing_data, routing_page
from .partial_loading import PartlyLoaded, load_pruned
from .profile import LayerProfile, Profile, profile
from .prune import merge, prune, zeroed
from .route_as import given, only, random, rank, route_as, top_k
from .routed_layer import RoutedLayer
from .routed_layers import routed_layers
from .self_contrast import SelfContrast, contrast
from .super_experts import (
    Found,
    SuperExpert,
    SuperExpertReport,
    damage,
    find_super_experts,
    matched_controls,
    mean_loss,
    report_super_experts,
)
from .task_patterns import Retrieved, TaskPatterns
from .tuning import tune

__all__ = [
    "CRITERIA",
    "Found",
    "LayerProfile",
    "MassiveActivation",
    "PartlyLoaded",
    "Profile",
    "Retrieved",
    "RoutedLayer",
    "SelfContrast",
    "SuperExpert",
    "SuperExpertReport",
    "TaskPatterns",
    "align",
    "choose_experts",
    "contrast",
    "damage",
    "find_super_experts",
    "given",
    "hc_smoe_groups",
    "load_pruned",
    "log_routing",
    "massive_activations",
    "matched_controls",
    "mean_loss",
    "merge",
    "only",
    "profile",
    "prune",
    "random",
    "rank",
    "report_super_experts",
    "route_as",
    "routed_layers",
    "routing_data",
    "routing_page",
    "scores",
    "sink_decay",
    "sink_mass",
    "top_k",
    "tune",
    "uncurl_groups",
    "zeroed",
]
