"""Expert parallelism: experts sharded over processes of torch.distributed.

Letters in all files: T tokens, H hidden size, E experts, K experts per token, n ranks.
"""

from __future__ import annotations

from .balance import move_experts, plan_placements, rebalance_experts
from .checkpoint import canonical_expert_order
from .dispatch import (
    AllGatherDispatcher,
    Dispatcher,
    DispatchOutput,
    LocalDispatcher,
    ReplicatedDispatcher,
)
from .exchange import AllToAllDispatcher, DedupAllToAllDispatcher, PaddedAllToAllDispatcher
from .loading import load_sharded_experts
from .placement import ExpertPlacement
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
    "DedupAllToAllDispatcher",
    "DispatchOutput",
    "Dispatcher",
    "ExpertPlacement",
    "LocalDispatcher",
    "MoEMeshes",
    "PaddedAllToAllDispatcher",
    "ReplicatedDispatcher",
    "canonical_expert_order",
    "clip_grad_norm_",
    "fully_shard_moe",
    "init_moe_meshes",
    "load_sharded_experts",
    "make_dispatcher",
    "move_experts",
    "plan_placements",
    "prepare_ddp",
    "rebalance_experts",
    "register_dispatcher",
    "shard_experts",
]
