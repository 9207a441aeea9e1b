"""The clock of every benchmark: interleaved samples, their medians and ratios."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from bench.harness.medians import median_ms

from moe_ops.bench import timing


class Clock:
    """Time that passes only when a job says so; `waits` is what the kernel would count."""

    def __init__(self, monkeypatch):
        self.now = self.waits = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "waited_s", lambda: self.waits)

    def job(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_order_rotates_with_the_rounds(clock):
    jobs = {name: clock.job(name, 0.1) for name in "abc"}
    timing.measure(jobs, budget_s=0.0, min_rounds=3, max_rounds=3)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "bca" + "cab"


def test_interleaving_stops_when_it_is_told():
    taken: list[tuple[str, int]] = []
    timing.interleave(list("abc"), lambda *sample: taken.append(sample), lambda number: number < 4)
    assert "".join(name for name, _ in taken) == "abc" + "bca" + "cab" + "abc"
    assert [number for _, number in taken] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    timing.interleave([], lambda *sample: taken.append(sample), lambda number: number < 2)
    assert len(taken) == 12


def test_medians_and_ratios(clock):
    jobs = {"ours": clock.job("ours", 0.02), "other": clock.job("other", 0.05)}
    samples = timing.measure(jobs, budget_s=1.0)
    assert samples["ours"].median == pytest.approx(0.02)
    assert timing.speedup(samples, "ours", "other") == pytest.approx(2.5)
    assert samples["ours"].to_dict().keys() == {"ms", "rounds"}


def test_ratio_is_of_samples_of_the_same_round():
    # The machine is twice as slow in rounds 1 and 2; `other` has no clean sample in round 0.
    ours = timing.Samples({0: 1.0, 1: 2.0, 2: 2.0, 3: 1.0})
    other = timing.Samples({1: 6.0, 2: 6.0, 3: 3.0})
    assert timing.speedup({"ours": ours, "other": other}, "ours", "other") == pytest.approx(3.0)


def test_a_sample_that_waited_is_repeated_and_then_left_out(clock):
    count = 0

    def job():
        nonlocal count
        count += 1
        clock.now += 0.2
        # Two warm-up calls, then rounds: round 1 waits once, round 3 twice.
        if count in (4, 7, 8):
            clock.now += 0.5
            clock.waits += 0.5

    samples = timing.measure({"job": job}, budget_s=0.0, min_rounds=4, max_rounds=4)["job"]
    assert sorted(samples.seconds) == [0, 1, 2]
    assert sorted(samples.waited) == [3]
    assert samples.clean and samples.median == pytest.approx(0.2)


def test_without_three_clean_samples_all_count_and_the_cell_is_marked():
    samples = timing.Samples({0: 1.0}, {1: 3.0, 2: 5.0})
    assert not samples.clean
    assert samples.median == 3.0
    assert samples.to_dict() == {"ms": 3000.0, "rounds": 3, "waited": 2, "noisy": True}


def test_a_slow_job_runs_twice(clock):
    jobs = {"slow": clock.job("slow", 9.0), "fast": clock.job("fast", 0.1)}
    samples = timing.measure(jobs, budget_s=0.5, slow_s=6.0)
    assert clock.calls.count("slow") == 2
    assert samples["slow"].median == 9.0 and samples["slow"].clean
    assert len(samples["fast"].seconds) >= 3


@pytest.mark.parametrize(("first", "warm_up"), [(0.1, 1), (1.0, 0), (7.0, 1)])
def test_a_known_first_call_may_save_the_second(clock, first, warm_up):
    jobs = {"job": clock.job("job", 1.0)}
    samples = timing.measure(jobs, budget_s=0.0, max_rounds=3, first_s={"job": first})
    assert len(clock.calls) == warm_up + 3
    assert samples["job"].median == pytest.approx(1.0)


def test_fast_jobs_repeat_within_a_sample(clock):
    samples = timing.measure({"job": clock.job("job", 1e-3)}, budget_s=0.0, max_rounds=3)
    assert len(clock.calls) == 2 + 3 * (1 + 10)
    assert samples["job"].median == pytest.approx(1e-3)


def test_a_short_job_does_not_pay_for_what_the_one_before_left_in_caches(clock):
    def job(name, seconds):
        def call():
            cold = clock.calls[-1:] != [name]
            clock.calls.append(name)
            clock.now += (3 if cold else 1) * seconds

        return call

    jobs = {"short": job("short", 0.006), "long": job("long", 0.1)}
    samples = timing.measure(jobs, budget_s=0.0, max_rounds=3)
    assert samples["short"].median == pytest.approx(0.006)
    assert samples["long"].median == pytest.approx(0.3)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no schedstat here")
def test_waiting_only_grows():
    before = timing.waited_s()
    assert 0 <= before <= timing.waited_s()


def test_median_of_a_few_functions(monkeypatch):
    now = [0.0]
    calls: list[str] = []

    def job(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds[len(calls) % len(seconds)]

        return call

    jobs = {"a": job("a", [1.0]), "b": job("b", [2.0])}
    assert median_ms(jobs, 3, warm=1, clock=lambda: now[0]) == {"a": 1000.0, "b": 2000.0}
    assert len(calls) == 8
