"""Cache policies: which experts stay in the cache, and which are prefetched.

A policy sees the calls of a model's layers of experts in order. A step is one forward of the model;
the calls of a step are numbered from 0.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .store import Key
from .trace import ExpertTrace


class CachePolicy:
    """Base class: subclasses override `victim`, and other methods as needed.

    All methods except `begin` are called with the cache locked and should be fast; `begin` should
    only assign finished results.
    """

    # True if a thread should fetch the experts that `wanted` lists.
    prefetches: bool = False

    def attach(self, num_banks: int, num_experts: int) -> None:
        """Stores the sizes of the cache's store. It is called once."""

    def begin(self, tokens: Tensor | None) -> None:
        """Handles the start of a step with these tokens [B, S], if known."""

    def use(self, bank: int, experts: Sequence[int]) -> None:
        """Handles a call of a layer that needs these experts now."""

    def loaded(self, key: Key) -> None:
        """Handles an expert that got a slot."""

    def victim(self, keys: Collection[Key]) -> Key:
        """Returns the expert to evict; `keys` is never empty."""
        raise NotImplementedError

    def wanted(self) -> Iterable[Key]:
        """Returns the experts that will be needed, in order, for prefetching policies."""
        return ()

    def outweighs(self, key: Key, victim: Key) -> bool:
        """Returns whether to fetch the wanted expert `key` and evict `victim`. This must be a
        strict order, or the thread never rests. By default only free slots are filled."""
        return False


class LRUPolicy(CachePolicy):
    """Evicts the least recently used expert."""

    def __init__(self) -> None:
        self._clock = count(1)
        self._last: dict[Key, int] = {}

    def use(self, bank: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._last[bank, expert] = next(self._clock)

    def victim(self, keys: Collection[Key]) -> Key:
        return min(keys, key=lambda key: self._last.get(key, 0))


class FIFOPolicy(CachePolicy):
    """Evicts the expert that was loaded first."""

    def __init__(self) -> None:
        self._clock = count(1)
        self._came: dict[Key, int] = {}

    def loaded(self, key: Key) -> None:
        self._came[key] = next(self._clock)

    def victim(self, keys: Collection[Key]) -> Key:
        return min(keys, key=lambda key: self._came.get(key, 0))


class LFUPolicy(LRUPolicy):
    """Evicts the expert that was used in the fewest calls; of several, the least recently used."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[Key] = Counter()

    def use(self, bank: int, experts: Sequence[int]) -> None:
        super().use(bank, experts)
        self._uses.update((bank, expert) for expert in experts)

    def victim(self, keys: Collection[Key]) -> Key:
        return min(keys, key=lambda key: (self._uses[key], self._last.get(key, 0)))


class BeladyPolicy(CachePolicy):
    """Evicts the expert whose next use is farthest away, which is optimal for a known routing.

    Args:
        trace: of the same model on the same tokens. If calls differ, evictions are worse, but
            results are unchanged.
        prefetch: prefetch in the order of the trace.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
    """

    def __init__(self, trace: ExpertTrace, *, prefetch: bool = True) -> None:
        self.prefetches = prefetch
        self._calls = trace.calls()
        self._now = -1  # The current call
        self._uses: dict[Key, list[int]] = {}
        for number, (bank, experts) in enumerate(self._calls):
            for expert in experts:
                self._uses.setdefault((bank, expert), []).append(number)

    def use(self, bank: int, experts: Sequence[int]) -> None:
        self._now += 1

    def next_use(self, key: Key) -> float:
        """Returns the number of the next call after this one that needs the expert."""
        uses = self._uses.get(key, [])
        index = bisect.bisect_right(uses, self._now)
        return uses[index] if index < len(uses) else float("inf")

    def victim(self, keys: Collection[Key]) -> Key:
        return max(keys, key=self.next_use)

    def wanted(self) -> Iterable[Key]:
        for bank, experts in self._calls[self._now + 1 :]:
            for expert in experts:
                yield bank, expert

    def outweighs(self, key: Key, victim: Key) -> bool:
        return self.next_use(key) < self.next_use(victim)


class PredictivePolicy(LRUPolicy):
    """Keeps experts by predicted demand: ExpertFlow's predictive expert cache.

    At the start of a step, the predictor returns the probability that each call of the step needs
    each expert. Experts of later calls are worth that probability; experts of completed calls are
    worth the frequency with which recent steps needed them, because they wait for the next step.
    The expert worth the least is evicted first, whatever its layer, and experts worth more than one
    in a slot are fetched, those of the next call first. Once a call has routed, its real selection
    replaces the predicted one.

    Args:
        predict: tokens [B, S] of a step -> probabilities [L, E] that the step needs each expert,
            one row per call; like `ExpertPredictor.stream()`.
        banks: index of the layer of each of the L calls; None: call i belongs to layer i.
        threshold: experts with smaller probabilities are not fetched.
        decay: decay of the frequencies of earlier steps.

    Source: He et al. 2024 (ExpertFlow, arXiv 2410.17954).
    """

    prefetches = True

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        banks: Sequence[int] | None = None,
        *,
        threshold: float = 0.3,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"PredictivePolicy: threshold must be in (0, 1], got {threshold}.")
        if not 0 <= decay < 1:
            raise ValueError(f"PredictivePolicy: decay must be in [0, 1), got {decay}.")
        self.predict = predict
        self.threshold = threshold
        self.decay = decay
        self._banks = None if banks is None else list(banks)
        self._next = 0  # Number of calls of this step that have begun
        self._chances: list[list[float]] = []
        self._habit: list[list[float]] = []
        self._order: list[tuple[int, Key]] = []

    def attach(self, num_banks: int, num_experts: int) -> None:
        if self._banks is None:
            self._banks = list(range(num_banks))
        self._num_experts = num_experts
        self._habit = [[0.0] * num_experts for _ in range(num_banks)]
        self._calls_of: list[list[int]] = [[] for _ in range(num_banks)]
        for call, bank in enumerate(self._banks):
            self._calls_of[bank].append(call)

    def begin(self, tokens: Tensor | None) -> None:
        assert self._banks is not None
        chances: Any = None if tokens is None else self.predict(tokens)
        if chances is None:
            rows = [self._habit[bank] for bank in self._banks]
        else:
            if chances.shape != (len(self._banks), self._num_experts):
                raise ValueError(
                    f"PredictivePolicy: predict must give [{len(self._banks)}, "
                    f"{self._num_experts}], one row a call and one column an expert, got shape "
                    f"{list(chances.shape)}."
                )
            rows = torch.as_tensor(chances).tolist()
        order = [
            (-chance, position, (self._banks[position], expert))
            for position, row in enumerate(rows)
            for expert, chance in enumerate(row)
            if chance >= self.threshold
        ]
        by_call = sorted(order, key=lambda entry: (entry[1], entry[0]))
        self._next, self._chances = 0, rows
        self._order = [(position, key) for _, position, key in by_call]

    def use(self, bank: int, experts: Sequence[int]) -> None:
        super().use(bank, experts)
        self._next += 1
        habit = self._habit[bank]
        for expert in range(len(habit)):
            habit[expert] *= self.decay
        for expert in experts:
            habit[expert] += 1 - self.decay

    def worth(self, key: Key) -> float:
        bank, expert = key
        calls = self._calls_of[bank]
        index = bisect.bisect_left(calls, self._next)
        if index < len(calls) and self._chances:
            return self._chances[calls[index]][expert]
        return self._habit[bank][expert] * self.decay

    def victim(self, keys: Collection[Key]) -> Key:
        return min(keys, key=lambda key: (self.worth(key), self._last.get(key, 0)))

    def wanted(self) -> Iterable[Key]:
        return [key for position, key in self._order if position >= self._next]

    def outweighs(self, key: Key, victim: Key) -> bool:
        return self.worth(key) > self.worth(victim)


POLICIES: dict[str, type[CachePolicy]] = {"lru": LRUPolicy, "lfu": LFUPolicy, "fifo": FIFOPolicy}
