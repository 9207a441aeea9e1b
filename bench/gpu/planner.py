"""Divides the time of a run over its cases.

Every case costs a setup (inputs, first calls, checking, capturing) and a number of rounds, each of
which runs every baseline once; the first case of a layer also creates its weights. Cases are taken
by rank while their setup and MIN_ROUNDS fit; the remaining time is divided into more rounds, up to
MAX_ROUNDS. The plan is recomputed before every case, with costs corrected by the actual times so
far, so that a slow machine drops the least important cases, not the last ones; cases that were
dropped too early are taken up again at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from bench.gpu.cases import Case
from bench.gpu.work import Work

MIN_ROUNDS = 5
MAX_ROUNDS = 25
# Long kernels vary less: fewer rounds suffice for cases that take longer than this.
LONG_ROUNDS, LONG_S = 3, 0.1

# Assumed time of a baseline: this many times the floor, and at least this long.
_SLOWER = 2.0
_LEAST_S = 20e-6
# Calls of a baseline before it is timed: checked, warmed up twice, captured, tried.
_FIRST_CALLS = 5
# Host work per baseline and case: building inputs, capturing a graph.
_BASELINE_S = 0.02
# Rate of creating weights and inputs, in bytes per second.
_FILL = 100e9


@dataclass(frozen=True)
class Cost:
    """Seconds of a case: setup, one round, and opening its group (weights)."""

    setup_s: float
    round_s: float
    open_s: float = 0.0

    @property
    def least_rounds(self) -> int:
        return LONG_ROUNDS if self.round_s > LONG_S else MIN_ROUNDS

    def of(self, rounds: int) -> float:
        return self.setup_s + rounds * self.round_s


@dataclass(frozen=True)
class Rates:
    """Rates for estimates: operations and bytes per second; and seconds of a flush."""

    flops: float
    bytes: float
    flush_s: float = 0.0

    def floor_s(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bytes)


def cost_of(work: Work, baselines: int, bank_bytes: float, rates: Rates) -> Cost:
    once = max(_SLOWER * rates.floor_s(work), _LEAST_S)
    return Cost(
        setup_s=baselines * (_FIRST_CALLS * once + _BASELINE_S),
        round_s=baselines * (once + rates.flush_s),
        open_s=bank_bytes / _FILL,
    )


@dataclass(frozen=True)
class Plan:
    """Rounds of each case that is run, by its index; others are omitted."""

    rounds: dict[int, int]
    seconds: float


def split(
    cases: Sequence[Case],
    costs: Sequence[Cost],
    budget_s: float,
    opened: Collection[tuple[str, str]] = (),
) -> Plan:
    """Selects cases by rank, within a rank one of each layer in turn, while they fit with their
    minimum rounds; then adds rounds for all. Groups in `opened` have their weights already."""
    spent = 0.0
    taken: list[int] = []
    opened = set(opened)
    for i in _by_importance(cases):
        need = costs[i].of(costs[i].least_rounds)
        if cases[i].group not in opened:
            need += costs[i].open_s
        if spent + need > budget_s:
            continue
        spent += need
        opened.add(cases[i].group)
        taken.append(i)
    more = sum((MAX_ROUNDS - costs[i].least_rounds) * costs[i].round_s for i in taken)
    share = min(1.0, (budget_s - spent) / more) if more > 0 else 0.0
    rounds = {}
    for i in sorted(taken):
        least = costs[i].least_rounds
        extra = int(share * (MAX_ROUNDS - least))
        rounds[i] = least + extra
        spent += extra * costs[i].round_s
    return Plan(rounds, spent)


def _by_importance(cases: Sequence[Case]) -> list[int]:
    seen: dict[tuple[int, tuple[str, str]], int] = {}
    turns = []
    for case in cases:
        key = case.rank, case.group
        seen[key] = turn = seen.get(key, -1) + 1
        turns.append(turn)
    return sorted(range(len(cases)), key=lambda i: (cases[i].rank, turns[i], i))


class Pacer:
    """Iterator over the cases in order, each with its rounds, until the time is up.

    Args:
        cases, costs: all cases, in the order of running, and their expected costs.
        now: the clock, in seconds.
        end: deadline.
    """

    def __init__(
        self, cases: Sequence[Case], costs: Sequence[Cost], now: Callable[[], float], end: float
    ) -> None:
        self._cases, self._costs, self._now, self._end = list(cases), list(costs), now, end
        self.left_out: list[Case] = list(cases)
        # Real over expected seconds of all cases so far; initially one second over one.
        self._expected = self._real = 1.0

    @property
    def drift(self) -> float:
        """Returns the ratio of real to expected time of the cases."""
        return min(5.0, max(0.3, self._real / self._expected))

    def __iter__(self) -> Iterator[tuple[Case, int]]:
        while True:
            before = len(self.left_out)
            yield from self._pass()
            if len(self.left_out) in (0, before):
                return

    def _pass(self) -> Iterator[tuple[Case, int]]:
        left = set(self.left_out)
        places = [i for i, case in enumerate(self._cases) if case in left]
        group: tuple[str, str] | None = None
        for n, at in enumerate(places):
            started = self._now()
            rest = places[n:]
            plan = split(
                [self._cases[i] for i in rest],
                [self._costs[i] for i in rest],
                (self._end - started) / self.drift,
                () if group is None else (group,),
            )
            if 0 not in plan.rounds:
                continue
            case, cost, rounds = self._cases[at], self._costs[at], plan.rounds[0]
            self.left_out.remove(case)
            yield case, rounds
            self._expected += cost.of(rounds) + (cost.open_s if case.group != group else 0.0)
            self._real += self._now() - started
            group = case.group
