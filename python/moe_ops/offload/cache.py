"""Cache of experts on the device, and the thread that prefetches them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from time import perf_counter

import torch
from torch import Tensor

from moe_ops._slots import SlotStream

from .policy import POLICIES, CachePolicy
from .store import ExpertStore, Key

# Number of wanted experts, per slot, that the thread considers before it gives up.
_LOOK_AHEAD = 2


@dataclass
class CacheStats:
    """Counters of a cache since its creation or `reset_stats`.

    Attributes:
        uses: experts that calls needed; the sum of the next three.
        hits: experts that were in the cache.
        late: experts that were being loaded.
        misses: experts that the call had to load.
        fetched: experts that the thread loaded before their use.
        wait_seconds: time that calls waited for experts.
        load_seconds: time of all loads, in calls and in the thread.
        predict_seconds: time of the policy's predictions.
        loaded_bytes: bytes of all loads.
    """

    uses: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    fetched: int = 0
    wait_seconds: float = 0.0
    load_seconds: float = 0.0
    predict_seconds: float = 0.0
    loaded_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Returns the fraction of uses that did not have to start a load."""
        return (self.hits + self.late) / self.uses if self.uses else 0.0


class ExpertCache:
    """Cache with N slots, one expert each, for all experts of a model.

    Whatever the policy, a call gets the experts that it needs: missing ones are loaded while it
    waits. With a prefetching policy, one thread fills slots ahead. Calls of several threads run one
    at a time.

    Args:
        store: source of the experts.
        num_slots: N, at least 1, for all layers together.
        policy: "lru", "lfu", "fifo", or a `CachePolicy`.
        device: of the slots. On CUDA, copies run on a separate stream, and the stream of a call
            waits for the copies that it needs.

    Raises:
        ValueError: no slots, or an unknown policy.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        policy: CachePolicy | str = "lru",
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"ExpertCache: num_slots must be at least 1, got {num_slots}.")
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(
                    f"ExpertCache: policy must be one of {', '.join(POLICIES)} or a Policy, got "
                    f"{policy!r}."
                )
            policy = POLICIES[policy]()
        self.store = store
        self.num_slots = min(num_slots, store.num_banks * store.num_experts)
        self.policy = policy
        self.device = torch.device(device)
        self.stats = CacheStats()
        policy.attach(store.num_banks, store.num_experts)
        self.slots = {
            name: torch.empty((self.num_slots, *stored.shape), dtype=stored.dtype, device=device)
            for name, stored in store.tensors.items()
        }
        self.turn = threading.RLock()  # Only one call at a time may hold experts.
        self._lock = threading.RLock()  # Guards everything below.
        self._loaded = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)  # For the thread: something may be wanted.
        # Counts notifications; a list, so that the thread can hold it without the cache.
        self._pulse = [0]
        self._starved = False  # The thread found no slot for a wanted expert.
        self._free = list(reversed(range(self.num_slots)))
        self._slot_of: dict[Key, int] = {}
        self._loading: set[int] = set()
        self._failed: dict[int, BaseException] = {}
        self._held = [0] * self.num_slots
        # Experts that a call waits for and no thread loads yet.
        self._missing: list[tuple[Key, int]] = []
        self._ahead: list[Key] = []  # Experts that the current call needs in its next round.
        self._copies = _Copies(self) if self.device.type == "cuda" else None
        self._fetcher: _Fetcher | None = None
        self.closed = False
        _caches.add(self)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the slots."""
        return sum(t.numel() * t.element_size() for t in self.slots.values())

    def reset_stats(self) -> CacheStats:
        """Resets the counters and returns their previous values."""
        with self._lock:
            old = CacheStats(**{f.name: getattr(self.stats, f.name) for f in fields(CacheStats)})
            self.stats = CacheStats()
        return old

    def residents(self) -> list[Key]:
        """Returns the experts that are in slots now."""
        with self._lock:
            return [key for key, slot in self._slot_of.items() if slot not in self._loading]

    # ----------------------------------------------------------------------------------- calls

    def begin(self, tokens: Tensor | None) -> None:
        """Notifies the policy of a step of the model, with tokens [B, S] if known."""
        start = perf_counter()
        self.policy.begin(tokens)
        with self._lock:
            self.stats.predict_seconds += perf_counter() - start
        self._wake()

    def rounds(self, bank: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Loads the experts that a call needs, in as few rounds as the slots allow.

        Yields:
            Pairs of an expert and its slot, valid until the next round; every expert is in one
            round. The caller must hold `turn`.

        Raises:
            RuntimeError: the cache is closed.
        """
        if self.closed:
            raise RuntimeError("ExpertCache: the cache must be open, got one that was closed.")
        with self._lock:
            self.policy.use(bank, experts)
            self.stats.uses += len(experts)
            there = self._slot_of
            order = sorted(experts, key=lambda expert: (bank, expert) not in there)
        size = self.num_slots
        if len(order) > size and self.policy.prefetches:
            size = max(1, size // 2)  # The other half is filled meanwhile.
        for first in range(0, len(order), size):
            now, later = order[first : first + size], order[first + size :]
            with self._lock:
                self._ahead = [(bank, expert) for expert in later]
            pairs = self._hold([(bank, expert) for expert in now])
            try:
                yield list(zip(now, pairs, strict=True))
            finally:
                self._release(pairs)

    def _hold(self, keys: list[Key]) -> list[int]:
        """Returns slots with the experts, which keep them until `_release`."""
        start = perf_counter()
        held: list[int] = []
        try:
            with self._lock:
                there = {key: self._slot_of[key] for key in keys if key in self._slot_of}
                for slot in there.values():
                    self._held[slot] += 1
                    held.append(slot)
                    late = slot in self._loading
                    self.stats.late += late
                    self.stats.hits += not late
                for key in keys:
                    if key not in there:
                        slot, mine = self._claim(key)
                        self._held[slot] += 1
                        held.append(slot)
                        self.stats.misses += mine
                        self.stats.late += not mine
                        if mine:
                            self._missing.append((key, slot))
            self._wake()  # The thread loads some of them.
            while (found := self._next_missing()) is not None:
                self._load(*found)
            with self._lock:
                slots = [self._slot_of[key] for key in keys]
                self._loaded.wait_for(lambda: not self._loading.intersection(slots))
                for slot in slots:
                    if slot in self._failed:
                        raise self._failed[slot]
                self.stats.wait_seconds += perf_counter() - start
        except BaseException:
            with self._lock:
                while self._missing:
                    key, slot = self._missing.pop()
                    self._loading.discard(slot)
                    self._forget(key, slot)
            self._release(held, used=False)
            raise
        if self._copies is not None:
            self._copies.wait_for(slots)
        return slots

    def _next_missing(self) -> tuple[Key, int] | None:
        with self._lock:
            return self._missing.pop() if self._missing else None

    def _release(self, slots: Sequence[int], *, used: bool = True) -> None:
        if used and self._copies is not None:
            self._copies.used(slots)
        with self._lock:
            for slot in slots:
                self._held[slot] -= 1
            if self._failed:
                for key, slot in list(self._slot_of.items()):
                    if slot in self._failed and not self._held[slot]:
                        self._forget(key, slot)
            if self._starved:
                self._notify()

    def _forget(self, key: Key, slot: int) -> None:
        self._failed.pop(slot, None)
        if self._slot_of.pop(key, None) is not None:
            self._free.append(slot)

    def _idle(self) -> list[Key]:
        """Returns the experts that may be evicted."""
        return [
            key
            for key, slot in self._slot_of.items()
            if not self._held[slot] and slot not in self._loading
        ]

    def _claim(self, key: Key) -> tuple[int, bool]:
        """Waits for a slot for `key`; returns it, and whether the caller must load it."""
        while key not in self._slot_of:
            if self._free:
                return self._take(key), True
            if idle := self._idle():
                self._free.append(self._slot_of.pop(self.policy.victim(idle)))
            else:  # The thread uses one.
                self._loaded.wait()
        return self._slot_of[key], False  # It was loaded meanwhile.

    def _take(self, key: Key) -> int:
        slot = self._free.pop()
        self._slot_of[key] = slot
        self._loading.add(slot)
        self.policy.loaded(key)
        return slot

    def _load(self, key: Key, slot: int) -> None:
        """Loads `key` into its slot."""
        start, failure = perf_counter(), None
        try:
            into = {name: t[slot] for name, t in self.slots.items()}
            if self._copies is None:
                self.store.read(key, into)
            else:
                self._copies.load(key, slot, into)
        except BaseException as error:
            failure = error
        with self._lock:
            self._loading.discard(slot)
            if failure is not None:
                self._failed[slot] = failure
                if not self._held[slot]:
                    self._forget(key, slot)
            self.stats.load_seconds += perf_counter() - start
            self.stats.loaded_bytes += self.store.expert_bytes
            self._loaded.notify_all()

    # -------------------------------------------------------------------------------- fetching

    def _wake(self) -> None:
        """Notifies the thread that experts may be wanted, and starts it if needed."""
        if not self.policy.prefetches or self.closed:
            return
        if self._fetcher is None or not self._fetcher.is_alive():
            self._fetcher = _Fetcher(self)
            self._fetcher.start()
        with self._lock:
            self._notify()

    def _notify(self) -> None:
        self._pulse[0] += 1
        self._news.notify_all()

    def _next_fetch(self) -> tuple[Key, int] | None:
        """Returns an expert to prefetch and its slot; None if there is none now."""
        victim, self._starved = None, False
        wanted = chain(self._ahead, self.policy.wanted())
        for key in islice(wanted, _LOOK_AHEAD * self.num_slots):
            if key in self._slot_of:
                continue
            if self._free:
                return key, self._take(key)
            if victim is None:
                losers = set(self._idle()).difference(self._ahead)
                if not losers:
                    self._starved = True
                    return None
                victim = self.policy.victim(losers)
            if key in self._ahead or self.policy.outweighs(key, victim):
                self._free.append(self._slot_of.pop(victim))
                return key, self._take(key)
            self._starved = True
        return None

    def fetch_one(self) -> int | None:
        """Loads an expert in this thread: one that a call waits for, or else the first wanted one.

        Returns:
            None after a load; the current count of notifications if there is nothing to load.
        """
        with self._lock:
            if self.closed:
                return self._pulse[0]
            found = self._next_missing()
            if found is None:
                found = self._next_fetch()
                self.stats.fetched += found is not None
            if found is None:
                return self._pulse[0]
        self._load(*found)
        return None

    def _after_fork(self) -> None:
        """Resets the state in a child process, whose only thread does not continue the loads in
        progress."""
        for key, slot in list(self._slot_of.items()):
            if slot in self._loading:
                self._loading.discard(slot)
                self._forget(key, slot)
        self._missing.clear()
        self._held = [0] * self.num_slots
        self._fetcher = None
        self.turn = threading.RLock()

    def close(self) -> None:
        """Ends the thread and closes the store. The model cannot run afterwards."""
        with self._lock:
            self.closed = True
            self._notify()
        if self._fetcher is not None and self._fetcher is not threading.current_thread():
            self._fetcher.join()
        self.store.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"ExpertCache(num_slots={self.num_slots}, of={self.store.num_banks} x "
            f"{self.store.num_experts} experts, policy={type(self.policy).__name__}, "
            f"size={self.num_bytes / 2**20:.1f} MiB, device={self.device})"
        )


class _Fetcher(threading.Thread):
    """Thread that loads wanted experts while its cache is alive."""

    def __init__(self, cache: ExpertCache) -> None:
        super().__init__(name="moe_ops expert fetcher", daemon=True)
        self._news, self._pulse = cache._news, cache._pulse
        self._cache = weakref.ref(cache)

    def run(self) -> None:
        while (cache := self._cache()) is not None and not cache.closed:
            seen = cache.fetch_one()
            del cache
            if seen is not None:
                with self._news:
                    if self._pulse[0] == seen:
                        # The cache may be freed without a notification.
                        self._news.wait(timeout=1.0)


# A process forks only when no cache is being changed.
_caches: weakref.WeakSet[ExpertCache] = weakref.WeakSet()
_locked: list[ExpertCache] = []


def _before_fork() -> None:
    for cache in list(_caches):
        cache._lock.acquire()
        _locked.append(cache)


def _after_fork(in_child: bool) -> None:
    while _locked:
        cache = _locked.pop()
        if in_child:
            cache._after_fork()
        cache._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(False),
        after_in_child=lambda: _after_fork(True),
    )


class _Copies(SlotStream):
    """Copies to CUDA on a separate stream."""

    def __init__(self, cache: ExpertCache) -> None:
        super().__init__(cache.device, cache.num_slots)
        self._store = cache.store
        self._pinned_store = cache.store.pinned
        self._staging = threading.local()  # Pinned memory of each loading thread

    def load(self, key: Key, slot: int, into: Mapping[str, Tensor]) -> None:
        store = self._store
        with self.filling(slot):
            if self._pinned_store:
                store.read(key, into, non_blocking=True)
            else:
                staging = self._pinned()
                if (last := getattr(self._staging, "last", None)) is not None:
                    last.synchronize()  # Its contents may not have been copied yet.
                store.read(key, staging)
                for name, tensor in into.items():
                    tensor.copy_(staging[name], non_blocking=True)
                self._staging.last = self.ready[slot]

    def _pinned(self) -> dict[str, Tensor]:
        if not hasattr(self._staging, "tensors"):
            self._staging.tensors = {
                name: torch.empty(stored.shape, dtype=stored.dtype, device="cpu", pin_memory=True)
                for name, stored in self._store.tensors.items()
            }
        return self._staging.tensors
