"""Experts on several processes of torch.distributed, each of which has some of them.

Letters in all files: T tokens, H hidden size, E experts, K experts a token, n ranks.
"""

from __future__ import annotations

from .comm import all_to_all_rows, exchange_counts, is_checking_splits, set_check_splits
from .dispatch import (
    Bank,
    Dispatched,
    Dispatcher,
    Gather,
    Local,
    Padded,
    Shared,
    Slots,
    Tokens,
)
from .loading import load_experts
from .placement import Move, Placement
from .registry import choose, register_dispatcher
from .sharding import (
    ExpertSharding,
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
    "choose",
    "clip_grad_norm_",
    "ddp_ignore",
    "exchange_counts",
    "fully_shard_moe",
    "is_checking_splits",
    "load_experts",
    "make_meshes",
    "register_dispatcher",
    "set_check_splits",
    "shard_experts",
]
