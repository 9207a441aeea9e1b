"""Clocks of the benchmark for cards, on a device that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bench.gpu.clock import CudaClock, HostClock


def test_host_clock():
    calls = []
    clock = HostClock()
    jobs = {n: clock.prepare(lambda n=n: calls.append(n)) for n in "ab"}
    calls.clear()
    samples = clock.rounds(jobs, 3)
    assert "".join(calls) == "abbaab"
    assert all(len(s.seconds) == 3 and s.clean for s in samples.values())


class Device:
    """The part of torch.cuda that the clock uses; remembers what was done, in order. Time passes
    when jobs say so."""

    def __init__(self, monkeypatch):
        self.done, self.now, self.capturing, self.reserved = [], 0.0, None, 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.done.append("event")
                self.at = device.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert pool == device.pool and device.capturing is None
                device.capturing, self.jobs = self, []

            def capture_end(self):
                device.capturing = None

            def replay(self):
                for job in self.jobs:
                    job()

        class Stream:
            def __init__(self, *args):
                pass

            def wait_stream(self, other):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *args):
                pass

        properties = SimpleNamespace(L2_cache_size=1 << 20, total_memory=100)
        for name, value in {
            "current_device": lambda: 0,
            "get_device_properties": lambda d: properties,
            "Stream": Stream,
            "stream": lambda s: s,
            "current_stream": lambda d: Stream(),
            "synchronize": lambda d: None,
            "memory_reserved": lambda d: self.reserved,
            "reset_peak_memory_stats": lambda d: None,
            "memory_allocated": lambda d: 5,
            "max_memory_allocated": lambda d: 12,
            "empty_cache": lambda: self.done.append("empty"),
            "graph_pool_handle": self.new_pool,
            "CUDAGraph": Graph,
            "Event": Event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.pool = 0

    def new_pool(self):
        self.pool = getattr(self, "pool", 0) + 1
        return self.pool

    def job(self, name, seconds, waits=False):
        def launch():
            self.done.append(name)
            self.now += seconds

        def call():
            if self.capturing is None:
                return launch()
            if waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.jobs.append(launch)

        return call


class ClockOnFake(CudaClock):
    _TYPE = "cpu"

    def _flush(self):
        super()._flush()
        self.flushed = getattr(self, "flushed", 0) + 1


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_cuda_clock_flushes_before_every_sample(device):
    clock = ClockOnFake()
    jobs = {n: clock.prepare(device.job(n, s)) for n, s in (("a", 0.004), ("b", 0.002))}
    # Called, timed, warmed up twice, captured, replayed, timed again.
    assert device.done.count("a") == 6 and jobs["a"].once_s == pytest.approx(0.004)
    device.done.clear()
    clock.flushed = 0
    samples = clock.rounds(jobs, 3)
    assert clock.flushed == 6
    assert [x for x in device.done if x != "event"] == list("abbaab")
    assert device.done[:3] == ["event", "a", "event"]
    assert samples["a"].median == pytest.approx(0.004) and len(samples["b"].seconds) == 3
    assert samples["b"].median == pytest.approx(0.002)


def test_cuda_clock_launches_what_it_cannot_capture(device):
    clock = ClockOnFake()
    prepared = clock.prepare(device.job("a", 0.004, waits=True))
    assert prepared.note.startswith("RuntimeError: operation not permitted")
    assert device.capturing is None
    device.done.clear()
    assert clock.rounds({"a": prepared}, 2)["a"].median == pytest.approx(0.004)
    assert device.done.count("a") == 2


def test_cuda_clock_captures_no_long_jobs(device):
    prepared = ClockOnFake().prepare(device.job("a", 0.5, waits=True))
    assert prepared.once_s == pytest.approx(0.5) and not prepared.note
    assert device.done.count("a") == 2


def test_cuda_clock_gives_memory_back_when_it_is_tight(device):
    clock = ClockOnFake()
    pool = device.pool
    clock.release()
    assert "empty" not in device.done and device.pool != pool
    device.reserved = 41
    clock.release()
    clock.prepare(device.job("a", 0.004))
    assert device.done.count("empty") == 3  # released, before warming up, before capturing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Captures CUDA graphs: needs a card.")
def test_cuda_clock():
    clock = CudaClock()
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    graph = clock.prepare(lambda: a @ a)
    waits = clock.prepare(lambda: (a @ a).sum().item())
    assert not graph.note and waits.note
    samples = clock.rounds({"graph": graph, "waits": waits}, 5)
    assert 0 < samples["graph"].median < samples["waits"].median
    clock.release()
