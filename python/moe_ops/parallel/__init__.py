"""Experts on several processes of torch.distributed, each of which has some of them.

Letters in all files: T tokens, H hidden size, E experts, K experts a token, n ranks.
"""

from __future__ import annotations

from .balance import move_experts, plan_placements, rebalance_experts
from .banks import ExpertSharding
from .checkpoint import canonical_expert_order
from .comm import all_to_all_rows, exchange_counts, is_checking_splits, set_check_splits
from .dispatch import (
    AllGatherDispatcher,
    Bank,
    Dispatcher,
    DispatchOutput,
    LocalDispatcher,
    ReplicatedDispatcher,
)
from .exchange import AllToAllDispatcher, DedupAllToAllDispatcher, PaddedAllToAllDispatcher
from .loading import load_sharded_experts
from .placement import ExpertPlacement, Move
from .registry import make_dispatcher, register_dispatcher
from .sharding import (
    MoEMeshes,
    clip_grad_norm_,
    fully_shard_moe,
    init_moe_meshes,
    prepare_ddp,
    shard_experts,
)

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Bank",
    "DedupAllToAllDispatcher",
    "DispatchOutput",
    "Dispatcher",
    "ExpertPlacement",
    "ExpertSharding",
    "LocalDispatcher",
    "MoEMeshes",
    "Move",
    "PaddedAllToAllDispatcher",
    "ReplicatedDispatcher",
    "all_to_all_rows",
    "canonical_expert_order",
    "clip_grad_norm_",
    "exchange_counts",
    "fully_shard_moe",
    "init_moe_meshes",
    "is_checking_splits",
    "load_sharded_experts",
    "make_dispatcher",
    "move_experts",
    "plan_placements",
    "prepare_ddp",
    "rebalance_experts",
    "register_dispatcher",
    "set_check_splits",
    "shard_experts",
]
