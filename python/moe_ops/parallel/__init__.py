"""Experts on several processes of torch.distributed, each of which has some of them.

Letters in all files: T tokens, H hidden size, E experts, K experts a token, n ranks.
"""

from __future__ import annotations

from .balance import balanced_placements, rebalance, rebalance_experts
from .banks import ExpertSharding
from .checkpoint import in_expert_order
from .comm import all_to_all_rows, exchange_counts, is_checking_splits, set_check_splits
from .dispatch import (
    Bank,
    Dispatched,
    Dispatcher,
    Gather,
    Local,
    Shared,
)
from .exchange import Padded, Slots, Tokens
from .loading import load_experts
from .placement import Move, Placement
from .registry import choose, register_dispatcher
from .sharding import (
    Meshes,
    clip_grad_norm_,
    ddp_ignore,
    fully_shard_moe,
    make_meshes,
    shard_experts,
)

__all__ = [
    "Bank",
    "Dispatched",
    "Dispatcher",
    "ExpertSharding",
    "Gather",
    "Local",
    "Meshes",
    "Move",
    "Padded",
    "Placement",
    "Shared",
    "Slots",
    "Tokens",
    "all_to_all_rows",
    "balanced_placements",
    "choose",
    "clip_grad_norm_",
    "ddp_ignore",
    "exchange_counts",
    "fully_shard_moe",
    "in_expert_order",
    "is_checking_splits",
    "load_experts",
    "make_meshes",
    "rebalance",
    "rebalance_experts",
    "register_dispatcher",
    "set_check_splits",
    "shard_experts",
]
