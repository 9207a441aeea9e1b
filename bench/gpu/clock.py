"""Interleaved samples of baselines: with CUDA events on a GPU, otherwise with the host's clock.

On a GPU a job is captured into a CUDA graph if possible, so that the time excludes Python;
otherwise it is launched from Python, with a note. Jobs long enough to hide launches behind kernels
are not captured: a graph would need its own memory for them.

Before every sample a buffer of several times the L2 cache is read, which evicts the job's operands;
the buffer is clean, so nothing is written back while the job runs. The flush also gives the host
time to enqueue the job, so that events measure the device. Every round runs each job once, in an
order that rotates.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_ops.bench.measure import in_a_sentence
from moe_ops.bench.timing import Samples, interleave

Job = Callable[[], object]


@dataclass
class Prepared:
    """Job prepared for timing. `note` is the reason for a launch from Python instead of a graph,
    `peak_bytes` the additional memory of a call; None if unknown."""

    call: Job
    once_s: float
    note: str = ""
    peak_bytes: int | None = None


class Clock(Protocol):
    device: torch.device
    flush_s: float

    def prepare(self, job: Job) -> Prepared:
        """Warms the job up, captures it, and times it once."""

    def rounds(self, jobs: Mapping[str, Prepared], count: int) -> dict[str, Samples]:
        """Returns `count` samples of each job, interleaved."""

    def release(self) -> None:
        """Drops prepared jobs and their memory."""


class HostClock:
    """Host clock, for runs without a GPU."""

    device = torch.device("cpu")
    flush_s = 0.0

    def prepare(self, job: Job) -> Prepared:
        job()
        return Prepared(job, self._timed(job))

    def rounds(self, jobs: Mapping[str, Prepared], count: int) -> dict[str, Samples]:
        samples = {name: Samples() for name in jobs}

        def sample(name: str, number: int) -> None:
            samples[name].seconds[number] = self._timed(jobs[name].call)

        interleave(list(jobs), sample, lambda number: number < count)
        return samples

    def release(self) -> None:
        """Does nothing: memory is freed once no case refers to it."""

    @staticmethod
    def _timed(job: Job) -> float:
        started = time.perf_counter()
        job()
        return time.perf_counter() - started


class CudaClock:
    """Clock of the current device."""

    _TYPE = "cuda"
    # Reading this many times the L2 cache evicts everything else.
    _TIMES_L2 = 4
    # Above this fraction of the GPU's memory, torch's cache is emptied before work on another
    # stream or in a graph's pool, which cannot use its blocks.
    _TIGHT = 0.4
    # Longer jobs are not captured.
    _LONG_S = 0.02

    def __init__(self) -> None:
        self.device = torch.device(self._TYPE, torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        size = max(64 << 20, self._TIMES_L2 * int(properties.L2_cache_size))
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=self.device)
        self._sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self._memory = properties.total_memory
        self._side = torch.cuda.Stream(self.device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._flush()
        self.flush_s = self._timed(self._flush)

    def prepare(self, job: Job) -> Prepared:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        job()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        once_s = self._timed(job)
        if once_s > self._LONG_S:
            return Prepared(job, once_s, peak_bytes=peak)
        self._warm_up(job)
        self._make_room()
        call, note = self._capture(job)
        call = call or job
        call()
        return Prepared(call, self._timed(call), note, peak)

    def rounds(self, jobs: Mapping[str, Prepared], count: int) -> dict[str, Samples]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in jobs}

        def sample(name: str, number: int) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush()
            pair[0].record()
            jobs[name].call()
            pair[1].record()
            events[name].append(pair)

        interleave(list(jobs), sample, lambda number: number < count)
        torch.cuda.synchronize(self.device)
        return {
            name: Samples({i: a.elapsed_time(b) * 1e-3 for i, (a, b) in enumerate(pairs)})
            for name, pairs in events.items()
        }

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        # Graphs of one case share a pool; the next case gets a new one, and this one is freed.
        self._pool = torch.cuda.graph_pool_handle()
        self._make_room()

    def _make_room(self) -> None:
        if torch.cuda.memory_reserved(self.device) > self._TIGHT * self._memory:
            gc.collect()
            torch.cuda.empty_cache()

    def _warm_up(self, job: Job) -> None:
        self._make_room()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            for _ in range(2):
                job()
        torch.cuda.synchronize(self.device)

    def _capture(self, job: Job) -> tuple[Job | None, str]:
        """Returns a replay of the job, or None and the reason. Its outputs are dropped, so that the
        graphs of a case, which run one after another, share memory."""
        graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        with torch.cuda.stream(self._side):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                job()
            except Exception as problem:
                failure = problem
            try:
                graph.capture_end()
            except Exception as problem:
                failure = failure or problem
        if failure is None:
            return graph.replay, ""
        note = in_a_sentence(failure)
        del failure
        with contextlib.suppress(Exception):
            torch.cuda.synchronize(self.device)
        return None, note

    def _flush(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def _timed(self, job: Job) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
