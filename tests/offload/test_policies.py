"""Tests of which experts stay: policies by hand-written sequences."""

from __future__ import annotations

import pytest
import torch

from moe_ops.offload import BeladyPolicy, ExpertCache, ExpertTrace, PredictivePolicy
from moe_ops.offload.policy import LRUPolicy
from moe_ops.offload.store import MemoryStore

# The sequence of Belady, Nelson and Shedler 1969, with three slots.
SEQUENCE = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


def trace_of(calls: list[int], num_experts: int = 6) -> ExpertTrace:
    ids = torch.tensor(calls, dtype=torch.int16).view(-1, 1, 1)
    steps = torch.ones(len(calls), 2, dtype=torch.int64)
    return ExpertTrace(ids, torch.zeros(len(calls)).long(), steps, [0], num_experts)


def cache_of(policy, num_slots: int, num_banks: int = 1, num_experts: int = 6) -> ExpertCache:
    bank = {"w_down": (torch.zeros(num_experts, 1, 1),)}
    return ExpertCache(MemoryStore([bank] * num_banks), num_slots, policy)


def call(cache: ExpertCache, bank: int, experts: list[int]) -> None:
    with cache.turn:
        for _ in cache.rounds(bank, experts):
            pass


@pytest.mark.parametrize(
    ("policy", "num_slots", "misses"),
    [("fifo", 3, 9), ("fifo", 4, 10), ("lru", 3, 10), ("lru", 4, 8), ("belady", 3, 7),
     ("belady", 4, 6)],
)  # fmt: skip
def test_misses(policy, num_slots, misses):
    """First in, first out has more misses with a slot more: Belady's anomaly."""
    if policy == "belady":
        policy = BeladyPolicy(trace_of(SEQUENCE), prefetch=False)
    cache = cache_of(policy, num_slots)
    for expert in SEQUENCE:
        call(cache, 0, [expert])
    assert cache.stats.misses == misses
    assert cache.stats.hits == len(SEQUENCE) - misses
    assert cache.stats.hit_rate == pytest.approx(1 - misses / 12)


def test_lfu():
    cache = cache_of("lfu", 2)
    for expert in (0, 0, 1, 2, 0, 2):  # 1 goes for 2; 0 has most uses and stays.
        call(cache, 0, [expert])
    assert sorted(cache.residents()) == [(0, 0), (0, 2)] and cache.stats.misses == 3


def test_belady_fetches_in_the_order_of_the_trace():
    cache = cache_of(BeladyPolicy(trace_of([0, 1, 2, 0]), prefetch=True), 2)
    cache.policy.prefetches = False  # The test is the thread.
    call(cache, 0, [0])
    assert cache.fetch_one() is None and cache.residents() == [(0, 0), (0, 1)]
    # 2 is used before 0 again: it may take its slot, once 1 is used.
    assert cache.fetch_one() is None and cache.residents() == [(0, 1), (0, 2)]
    call(cache, 0, [1])
    assert cache.fetch_one() is not None or cache.residents() == [(0, 2), (0, 0)]


def test_predicted():
    """Chances of the calls to come, habits of those that are over."""
    chances = torch.tensor([[0.9, 0.3, 0.0, 0.0], [0.0, 0.1, 0.8, 0.6]])
    policy = PredictivePolicy(lambda tokens: chances, threshold=0.2)
    policy.prefetches = False
    cache = cache_of(policy, 3, num_banks=2, num_experts=4)
    cache.begin(torch.zeros(1, 1).long())
    for _ in range(3):
        assert cache.fetch_one() is None
    assert cache.residents() == [(0, 0), (0, 1), (1, 2)]
    # (1, 3) is worth more than (0, 1).
    assert cache.fetch_one() is None
    assert cache.residents() == [(0, 0), (1, 2), (1, 3)]
    # A miss: the true choice of the call replaces the predicted one, and 0 goes, its call over.
    call(cache, 0, [1])
    assert cache.residents() == [(1, 2), (1, 3), (0, 1)]
    assert cache.fetch_one() is not None
    call(cache, 1, [2])
    assert cache.stats.hits == 1 and cache.stats.misses == 1
    # Without tokens, what steps have used lately.
    cache.begin(None)
    assert policy.worth((0, 1)) == pytest.approx(0.1) and policy.worth((0, 0)) == 0.0


def test_predicted_bad_calls():
    with pytest.raises(ValueError, match="threshold"):
        PredictivePolicy(lambda t: t, threshold=0.0)
    with pytest.raises(ValueError, match="decay"):
        PredictivePolicy(lambda t: t, decay=1.0)
    cache = cache_of(PredictivePolicy(lambda tokens: torch.zeros(3, 2)), 2)
    with pytest.raises(ValueError, match=r"must give \[1, 6\]"):
        cache.begin(torch.zeros(1, 1).long())


def test_more_slots_than_experts():
    assert cache_of(LRUPolicy(), 100).num_slots == 6
