"""Layers built from the ops: routers, experts, the mixture-of-experts layer and its losses.

Letters in all files: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from . import experts_hook  # noqa: F401  # It registers.
from .all_experts import ExpertBatchNorm, mix_outputs
from .attention import AttentionExperts, KVCache
from .config import ExpertsConfig, MoEConfig, RouterConfig
from .expert_lora import ExpertLoRA
from .experts import Experts
from .fp8 import clear_fp8_cache
from .latent import LatentProjection
from .losses import (
    concentration_loss,
    device_balance_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_entropy_loss,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from .mixture_of_depths import MixtureOfDepths
from .moe import MoE, MoEOutput
from .norm import AddRMSNorm
from .peer import PEER
from .record import RoutingRecord, record_routing, replay_routing
from .router import (
    CapacityMixin,
    CapacityRouter,
    ExpertChoiceRouter,
    GateRouter,
    HashRouter,
    L1Coefficient,
    ReLURouter,
    Router,
    SparseMixerRouter,
    TopKRouter,
    TopPRouter,
    relu_router_loss,
)
from .routing import Routing
from .shared_experts import SharedExperts
from .soft_moe import SoftMoE
from .stats import ExpertLoadStats, count_tokens_per_expert
from .zero_experts import ZeroComputationExperts

__all__ = [
    "PEER",
    "AddRMSNorm",
    "AttentionExperts",
    "CapacityMixin",
    "CapacityRouter",
    "ExpertBatchNorm",
    "ExpertChoiceRouter",
    "ExpertLoRA",
    "ExpertLoadStats",
    "Experts",
    "ExpertsConfig",
    "GateRouter",
    "HashRouter",
    "KVCache",
    "L1Coefficient",
    "LatentProjection",
    "MixtureOfDepths",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "ReLURouter",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingRecord",
    "SharedExperts",
    "SoftMoE",
    "SparseMixerRouter",
    "TopKRouter",
    "TopPRouter",
    "ZeroComputationExperts",
    "clear_fp8_cache",
    "concentration_loss",
    "count_tokens_per_expert",
    "device_balance_loss",
    "load_balancing_loss",
    "mix_outputs",
    "mutual_information_loss",
    "record_routing",
    "relu_router_loss",
    "replay_routing",
    "router_entropy_loss",
    "router_z_loss",
    "sequence_balance_loss",
    "update_expert_bias",
]
