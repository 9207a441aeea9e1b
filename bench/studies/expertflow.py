"""ExpertFlow: hit rates of expert caches with and without predicted routes, on routes of trained
models; and the experts used per batch after regrouping sequences by prediction.

Cache simulations ignore time: between two calls as many experts are fetched as a token uses in one.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_ops.offload import (
    BeladyPolicy,
    CachePolicy,
    ExpertCache,
    ExpertTrace,
    PredictivePolicy,
    record_expert_trace,
    split_batch_by_experts,
    train_predictor,
)
from moe_ops.offload.schedule import num_active
from moe_ops.offload.store import MemoryStore

from .compare import Series, series
from .on_subject import Loaded, described, load
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from .text import heldout_batches

SHARES = (0.25, 0.5)
STREAMS = (1, 8)
STEPS = 600  # The predictor's parameters.
TRAINED = 96  # Sequences of each domain for its training.
TESTED = 2  # Held-out sequences of each domain.
PROMPT = 32  # Tokens used for regrouping sequences.
SEED = "all arms of a seed"


def column(share: float, streams: int) -> str:
    return f"hits, cache {share:.0%}, {streams} stream{'s' * (streams > 1)}"


EXPERTS = "experts a step of both halves"


class TokenTable:
    """Counts of each token's experts: the predictor's baseline."""

    def __init__(self, trace: ExpertTrace, vocab_size: int) -> None:
        hot = trace.multi_hot().float()
        prior = hot.mean(0)
        counts = torch.zeros(vocab_size, *prior.shape).index_add_(0, trace.tokens, hot)
        seen = torch.zeros(vocab_size).index_add_(0, trace.tokens, torch.ones(len(hot)))
        self.chances = (counts + prior) / (seen + 1)[:, None, None]

    def __call__(self, tokens: Tensor) -> Tensor:
        return 1 - (1 - self.chances[tokens.flatten()]).prod(0)


@torch.no_grad()
def routes_of(model: torch.nn.Module, batches: list[Tensor]) -> ExpertTrace:
    with record_expert_trace(model) as recorder:
        for rows in batches:
            model(rows)
    return recorder.trace()


def steps_of(trace: ExpertTrace, streams: list[int], length: int) -> ExpertTrace:
    """Returns the routes of some sequences of a trace in the order of batched decoding."""
    rows = [trace.sequences()[stream] for stream in streams]
    order = torch.stack(rows, 1).flatten()  # Step by step, all streams of a step.
    steps = torch.tensor([[len(streams), 1]] * length)
    return ExpertTrace(trace.ids[order], trace.tokens[order], steps, trace.banks, trace.num_experts)


def hit_rate(trace: ExpertTrace, share: float, policy: CachePolicy | str, fetches: int) -> float:
    """Returns the fraction of the experts needed by calls that are in the cache."""
    num_banks, num_experts = len(trace.banks), trace.num_experts
    store = MemoryStore([{"w_down": (torch.zeros(num_experts, 1, 1),)}] * num_banks)
    cache = ExpertCache(store, round(share * num_banks * num_experts), policy)
    cache.policy.prefetches = False  # Time is not simulated, so no thread is needed.
    calls = iter(trace.calls())
    for tokens in trace.tokens.split(trace.steps[:, 0].tolist()):
        cache.begin(tokens[:, None])
        for _ in trace.banks:
            bank, experts = next(calls)
            for _ in range(fetches):
                if cache.fetch_one() is not None:
                    break
            with cache.turn:
                for _ in cache.rounds(bank, experts):
                    pass
    return cache.stats.hits / cache.stats.uses


def whole(name: str) -> Job:
    """Runs all arms of a seed: they share the model and its routes."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        vocab_size = there.model.config.vocab_size
        trained = [
            rows[:, :-1]
            for domain in there.domains
            for rows in there.profiled(domain, seed, TRAINED)
        ]
        trace = routes_of(there.model, trained)
        table = TokenTable(trace, vocab_size)
        predictor = train_predictor(trace, vocab_size, steps=STEPS, seed=seed)
        held = [
            heldout_batches(domain, 1, TESTED, there.length)[0][:, :-1]
            for domain in there.domains.values()
        ]
        test = routes_of(there.model, held)
        top_k = test.ids.shape[2]
        chances = torch.cat([predictor.chances(rows) for rows in held])
        hot = test.multi_hot()

        def recall(found: Tensor) -> float:
            best = found.topk(top_k, dim=-1).indices
            return (hot.gather(2, best).sum() / hot.sum()).item()

        rows: dict[str, dict[str, float | None]] = {}
        for streams in STREAMS:
            for share in SHARES:
                for arm, value in hits(test, streams, share, table, predictor).items():
                    rows.setdefault(arm, {})[column(share, streams)] = value
        columns = [*rows["LRU"], EXPERTS]
        rows |= regrouped(there, chances, test, seed)
        return {
            "rows": {arm: {**dict.fromkeys(columns), **row} for arm, row in rows.items()},
            "recall": {
                "predicted": recall(chances.flatten(0, 1)),
                "table of tokens": recall(table.chances[test.tokens]),
            },
        }

    return perform


def hits(
    test: ExpertTrace, streams: int, share: float, table: TokenTable, predictor: Any
) -> dict[str, float]:
    """Returns the hit rate by arm, the mean over groups of sequences of mixed domains."""
    length, top_k = len(test.sequences()[0]), test.ids.shape[2]
    num = len(test.sequences())
    groups = [list(range(first, num, num // streams))[:streams] for first in range(num // streams)]
    found: dict[str, list[float]] = {}
    for group in groups:
        trace = steps_of(test, group, length)
        arms: dict[str, tuple[Callable[[], CachePolicy | str], int]] = {
            "LRU": (lambda: "lru", 0),
            "LFU": (lambda: "lfu", 0),
            "FIFO": (lambda: "fifo", 0),
            "optimum, nothing fetched": (lambda t=trace: BeladyPolicy(t), 0),
            "optimum": (lambda t=trace: BeladyPolicy(t), top_k),
            "table of tokens": (lambda: PredictivePolicy(table), top_k),
            "predicted": (lambda: PredictivePolicy(predictor.stream()), top_k),
        }
        for arm, (policy, fetches) in arms.items():
            found.setdefault(arm, []).append(hit_rate(trace, share, policy(), fetches))
    return {arm: fmean(values) for arm, values in found.items()}


def regrouped(
    there: Loaded, chances: Tensor, test: ExpertTrace, seed: int
) -> dict[str, dict[str, float | None]]:
    """Returns the experts in use after the prompts, with sequences split into two halves by
    predicted use, by actual use, and at random."""
    num, length = len(chances), chances.shape[1]
    used = test.multi_hot().view(num, length, *chances.shape[2:])
    generator = torch.Generator().manual_seed(seed)

    def cost(halves: tuple[Tensor, Tensor]) -> float:
        steps = range(PROMPT, length)
        return fmean(sum(num_active(used[half, step]) for half in halves) for step in steps)

    def by(routes: Tensor) -> float:
        return cost(split_batch_by_experts(routes))

    draws = []
    for _ in range(8):
        order = torch.randperm(num, generator=generator)
        draws.append(cost((order[: num // 2], order[num // 2 :])))
    return {
        "regrouped by prediction": {EXPERTS: by((chances[:, :PROMPT] > 0.5).any(1))},
        "regrouped by the prompt's routes": {EXPERTS: by(used[:, :PROMPT].any(1))},
        "regrouped by all routes": {EXPERTS: by(used[:, PROMPT:].any(1))},
        "halves at random": {EXPERTS: fmean(draws)},
    }


def study(name: str, size: str, rank: int, minutes: float, model: str) -> Study:
    quarter, batch = column(0.25, 1), column(0.25, 8)
    hypotheses = [
        Hypothesis(
            "predicted routes find more experts there than LRU, a quarter in the cache",
            lambda r: r.gap("predicted", "LRU", quarter), "of the uses", 0.0, False, key="lru",
        ),
        Hypothesis(
            "so too with eight streams",
            lambda r: r.gap("predicted", "LRU", batch), "of the uses", 0.0, False, key="batch",
        ),
        Hypothesis(
            "and than LFU", lambda r: r.gap("predicted", "LFU", quarter), "of the uses", 0.0, False,
            key="lfu",
        ),
        Hypothesis(
            "the predictor finds more than a table of tokens",
            lambda r: r.gap("predicted", "table of tokens", quarter), "of the uses", 0.0, False,
            key="table",
        ),
        Hypothesis(
            "batches regrouped by prediction use fewer experts than random halves",
            lambda r: r.gap("regrouped by prediction", "halves at random", EXPERTS), "experts",
            key="regrouped",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            **described(model),
            "Predictor": (
                f"{STEPS} steps on the routes of {TRAINED} training sequences of each kind"
            ),
            "Columns": (
                "share of the experts needed that were in a slot, between calls as many fetched as "
                "a token uses; experts of both halves a step, summed over layers"
            ),
        }

    return Study(name, size, rank, {SEED: whole(model)}, 5, minutes, hypotheses, made, pictures)


def pictures(results: Results) -> list[Picture]:
    """Returns pictures of hit rates of one stream, by the size of the cache."""
    lines: Series = {}
    for arm in ("LRU", "LFU", "table of tokens", "predicted", "optimum"):
        rows = zip(*(results.of(arm, column(share, 1)) for share in SHARES), strict=True)
        lines[arm] = series(list(SHARES), [list(row) for row in rows])
    return [
        Picture(
            "hits", "Experts that were there when they were needed, one stream",
            "share of the experts that fit", "of the uses", "lines", lines,
        )
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "expertflow",
    (
        study("expertflow-subject", "16 experts", 46, 8.0, "subject"),
        study("expertflow-fine", "32 experts, 1 shared", 47, 10.0, "fine"),
    ),
    (
        Headline(
            "lru", "predicted routes hit more often than LRU", "91.9 to 76.6 %", "mechanism",
            shown="most of what a token will use is known from its text",
        ),
        Headline("batch", "so too with eight streams", "85.9 to 58.4 % at 16", "mechanism"),
        Headline("lfu", "and than LFU", "not compared", "mechanism"),
        Headline(
            "table", "the predictor is more than a table of tokens", "not compared", "quality",
            shown="the bytes before a byte tell where it goes, too",
        ),
        Headline(
            "regrouped", "regrouping lowers the experts of a batch", "1.03 to 1.17 times as fast",
            "cost", not_shown="grouped by what they will use it would be 3 of 85",
            shown="by 3 %; likely: sequences of a kind share experts",
        ),
    ),
)  # fmt: skip
