"""The ops around the GEMMs: router, sorting of slots, weighted sum of expert outputs.

Each is timed against the code that transformers 5 runs for it, with E experts and K per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops.bench.timing import measure, speedup

NUM_EXPERTS, TOP_K, HIDDEN = 128, 8, 2048
Jobs = dict[str, Callable[[], Any]]
OURS = "moe_ops"


def router_jobs(num_tokens: int) -> Jobs:
    logits = torch.randn(num_tokens, NUM_EXPERTS)

    def softmax_topk() -> tuple[Tensor, Tensor]:
        probs = torch.softmax(logits, dim=-1, dtype=torch.float)
        values, ids = torch.topk(probs, TOP_K, dim=-1)
        values /= values.sum(dim=-1, keepdim=True)
        return values, ids

    return {
        OURS: lambda: moe_ops.topk_router(logits, TOP_K, renormalize=True),
        "softmax, topk": softmax_topk,
    }


def sort_jobs(num_tokens: int) -> Jobs:
    ids = _routing(num_tokens)[1]

    def sort_histogram() -> tuple[Tensor, Tensor, Tensor]:
        sorted_ids, row_to_slot = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        slot_to_row = torch.empty_like(row_to_slot)
        slot_to_row[row_to_slot] = torch.arange(row_to_slot.numel())
        return ends, row_to_slot, slot_to_row

    def one_hot_where() -> list[tuple[Tensor, ...]]:
        mask = torch.nn.functional.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        return [torch.where(mask[expert[0]]) for expert in hit]

    return {
        OURS: lambda: moe_ops.sort_by_expert(ids, NUM_EXPERTS),
        "sort, histc, cumsum": sort_histogram,
        "one_hot, where": one_hot_where,
    }


def combine_jobs(num_tokens: int) -> Jobs:
    weights, ids = _routing(num_tokens)
    expert_offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, NUM_EXPERTS)
    rows = torch.randn(num_tokens * TOP_K, HIDDEN)
    slots, inverse = row_to_slot.long(), slot_to_row.long().reshape(-1)
    row_weights, token_of_row = weights.reshape(-1)[slots], slots // TOP_K

    def weigh_and_sum() -> Tensor:
        weighted = (rows * row_weights.unsqueeze(-1))[inverse]
        return weighted.view(num_tokens, TOP_K, HIDDEN).sum(dim=1)

    def index_add() -> Tensor:
        y = torch.zeros(num_tokens, HIDDEN)
        return y.index_add_(0, token_of_row, rows * row_weights.unsqueeze(-1))

    return {
        OURS: lambda: moe_ops.unpermute(rows, expert_offsets, slot_to_row, weights),
        "weigh, gather, sum": weigh_and_sum,
        "index_add_": index_add,
    }


PARTS: dict[str, Callable[[int], Jobs]] = {
    "router": router_jobs,
    "sort": sort_jobs,
    "combine": combine_jobs,
}


def measure_part(part: str, num_tokens: int, *, budget_s: float) -> dict[str, Any]:
    """Returns microseconds of each form; `speedup` is moe_ops over each other form."""
    jobs = PARTS[part](num_tokens)
    with torch.no_grad():
        samples = measure(jobs, budget_s=budget_s)
    return {
        "part": part,
        "T": num_tokens,
        "us": {name: sample.median * 1e6 for name, sample in samples.items()},
        "speedup": {name: speedup(samples, OURS, name) for name in jobs if name != OURS},
        "noisy": [name for name, sample in samples.items() if not sample.clean],
    }


def _routing(num_tokens: int) -> tuple[Tensor, Tensor]:
    weights, ids = moe_ops.topk_router(torch.randn(num_tokens, NUM_EXPERTS), TOP_K)
    return weights, ids.long()
