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
    choose,
    register_dispatcher,
)
from .placement import Move, Placement

__all__ = [
    "Bank",
    "Dispatched",
    "Dispatcher",
    "Gather",
    "Local",
    "Move",
    "Padded",
    "Placement",
    "Shared",
    "Slots",
    "Tokens",
    "all_to_all_rows",
    "choose",
    "exchange_counts",
    "is_checking_splits",
    "register_dispatcher",
    "set_check_splits",
]
