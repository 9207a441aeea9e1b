"""One model, one text, all policies.

Letters: B streams, L layers of experts, E experts per layer, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bench.studies.expertflow import TokenTable, routes_of
from bench.studies.text import heldout_batches, load_domains, train_batches
from bench.studies.training import Recipe
from moe_ops.bench.timing import interleave
from moe_ops.layers import Experts
from moe_ops.offload import (
    BeladyPolicy,
    CachePolicy,
    ExpertCache,
    ExpertPredictor,
    ExpertTrace,
    OffloadedExperts,
    PredictivePolicy,
    offload_experts,
    record_expert_trace,
    train_predictor,
)
from moe_ops.offload.store import FileStore
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig
from moe_ops.zoo.lm.model import CausalLM

DOMAINS = ("reference", "code", "maths")
VOCAB = 256
DELAY = 1e-3


@dataclass
class Plan:
    """Measurement plan; the defaults are those of the page.

    intermediate_size: of the experts after widening. tokens: of each stream, after a prefill of
    `prompt`. stores: "cached": the file stays in the system's cache; "disk": it is read from the
    disk; "delayed": cached, and each read takes at least a millisecond, in which the thread sleeps,
    as during a copy by a device.
    """

    train_steps: int = 300
    predictor_steps: int = 600
    trace_batches: int = 24
    hidden_size: int = 128
    num_layers: int = 4
    num_experts: int = 16
    top_k: int = 2
    intermediate_size: int = 1024
    prompt: int = 16
    tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    caches: tuple[float, ...] = (0.25, 0.5)
    stores: tuple[str, ...] = ("cached", "disk", "delayed")
    rounds: int = 3
    model: Path | None = None


def make_model(plan: Plan) -> CausalLM:
    """Returns the model before it is widened, trained on the bytes of three domains."""
    if plan.model is not None:
        return DeepSeek.from_pretrained(plan.model)
    torch.manual_seed(0)
    config = DeepSeekConfig(
        vocab_size=VOCAB,
        hidden_size=plan.hidden_size,
        num_layers=plan.num_layers,
        num_dense_layers=0,
        num_heads=4,
        head_size=plan.hidden_size // 4,
        latent=False,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        num_shared_experts=0,
        renormalize=True,
        intermediate_size=plan.hidden_size,
        expert_balance_coefficient=0.01,
    )
    model = DeepSeek(config)
    recipe = Recipe(plan.train_steps, batch=15, rate=3e-3)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.rate, (0.9, 0.95), weight_decay=recipe.weight_decay
    )
    batches = train_batches(load_domains(DOMAINS), recipe.steps, recipe.batch, recipe.length, 0)
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        loss = model.loss(rows).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def widen(model: nn.Module, intermediate_size: int) -> nn.Module:
    """Gives experts more neurons, all zero, which keeps the function."""
    for module in list(model.modules()):
        if isinstance(module, Experts) and module.intermediate_size < intermediate_size:
            wide = module.blank(module.num_experts, intermediate_size=intermediate_size)
            old = module.intermediate_size
            for weight in (wide.w_gate_up, wide.w_down):
                weight.zero_()
            wide.w_gate_up[:, :old] = module.w_gate_up[:, :old]
            wide.w_gate_up[:, intermediate_size : intermediate_size + old] = module.w_gate_up[
                :, old:
            ]
            wide.w_down[:, :, :old] = module.w_down
            for name in ("w_gate_up", "w_down"):
                setattr(module, name, getattr(wide, name))
            module.intermediate_size = intermediate_size
    return model


def texts(plan: Plan, batch: int) -> Tensor:
    """Returns [B, prompt + tokens] held-out bytes, the domains in turn."""
    length = plan.prompt + plan.tokens
    domains = load_domains(DOMAINS)
    rows = [heldout_batches(d, 1, batch, length)[0][:, :length] for d in domains]
    return torch.stack(rows, 1).flatten(0, 1)[:batch].contiguous()


@torch.no_grad()
def decode(model: CausalLM, text: Tensor, prompt: int) -> list[tuple[float, float]]:
    """Reads a text byte by byte after its first bytes; returns for each step its seconds and the
    time that threads of this process waited for a core."""
    cache = model.new_cache()
    model(text[:, :prompt], cache=cache, last=1)
    found = []
    for position in range(prompt, text.shape[1]):
        delay, start = core_waits(), perf_counter()
        model(text[:, position : position + 1], cache=cache, last=1)
        found.append((perf_counter() - start, core_waits() - delay))
    return found


def recall(chances: Tensor, trace: ExpertTrace) -> float:
    """Returns the fraction of the used experts among the K with the highest predicted
    probability."""
    hot = trace.multi_hot()
    best = chances.topk(trace.ids.shape[2], dim=-1).indices
    return (hot.gather(2, best).sum() / hot.sum()).item()


def policies(
    oracle: ExpertTrace, table: TokenTable, predictor: ExpertPredictor
) -> dict[str, Callable[[], CachePolicy | str]]:
    return {
        "LRU": lambda: "lru",
        "LFU": lambda: "lfu",
        "FIFO": lambda: "fifo",
        "Belady": lambda: BeladyPolicy(oracle, prefetch=False),
        "Belady, fetching ahead": lambda: BeladyPolicy(oracle),
        "predicted by a table of tokens": lambda: PredictivePolicy(table),
        "predicted (PLEC)": lambda: PredictivePolicy(predictor.stream()),
    }


def measure(plan: Plan, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures all cells of the plan; in every round the policies take turns."""
    torch.set_num_threads(1)
    model = make_model(plan)
    domains = load_domains(DOMAINS)
    say("routes of the training text")
    batches = list(train_batches(domains, plan.trace_batches, 15, 127, seed=1))
    trace = routes_of(model, batches)
    table = TokenTable(trace, VOCAB)
    predictor = train_predictor(trace, VOCAB, steps=plan.predictor_steps)
    test = routes_of(model, [texts(plan, 12)])
    found: dict[str, Any] = {
        "recall": {
            "table of tokens": recall(table.chances[test.tokens], test),
            "predictor": recall(predictor.chances(test.tokens.view(12, -1)).flatten(0, 1), test),
        },
        "predictor_bytes": sum(p.nbytes for p in predictor.parameters()),
        "cells": [],
    }
    state = model.state_dict()

    def fresh() -> CausalLM:
        again = DeepSeek(model.config).eval()
        again.load_state_dict(state)
        widen(again, plan.intermediate_size)
        return again

    path = folder / "experts.safetensors"
    with offload_experts(fresh(), 1, path=path) as first:
        found |= {
            "expert_bytes": first.store.expert_bytes,
            "num_experts": first.store.num_banks * first.store.num_experts,
        }
        found["page_in_ms"] = {kind: page_in(path, kind) * 1e3 for kind in plan.stores}
    for batch in plan.batches:
        text = texts(plan, batch)
        whole = fresh()
        with record_expert_trace(whole) as recorder:
            decode(whole, text, plan.prompt)
        oracle = recorder.trace()
        steps = zip(*(decode(whole, text, plan.prompt) for _ in range(plan.rounds)), strict=True)
        seconds = sum(min(step, key=lambda sample: sample[1])[0] for step in steps)
        in_memory = batch * plan.tokens / seconds
        del whole
        for store in plan.stores:
            for share in plan.caches:
                say(f"{batch} streams, {store}, cache {share:.0%}")
                of = policies(oracle, table, predictor)
                cells = _cells(plan, fresh, path, store, share, text, of)
                for cell in cells:
                    cell |= {"streams": batch, "in_memory": in_memory}
                found["cells"] += cells
    return found


class Delayed(FileStore):
    """Store whose reads take at least DELAY seconds."""

    def read(self, key: Any, into: Any, *, non_blocking: bool = False) -> None:
        end = perf_counter() + DELAY
        super().read(key, into, non_blocking=non_blocking)
        time.sleep(max(0.0, end - perf_counter()))


def opened_as(path: Path, store: str) -> FileStore:
    return (Delayed if store == "delayed" else FileStore).open(path, keep_cached=store != "disk")


def page_in(path: Path, store: str) -> float:
    """Returns the median seconds to read one expert."""
    opened = opened_as(path, store)
    into = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in opened.tensors.items()}
    keys = [(b, e) for b in range(opened.num_banks) for e in range(opened.num_experts)]
    if store == "disk":
        opened.drop_cached()
    times = []
    for key in [*keys[:2], *keys]:
        start = perf_counter()
        opened.read(key, into)
        times.append(perf_counter() - start)
    opened.close()
    return torch.tensor(times[2:]).median().item()


def _cells(
    plan: Plan,
    fresh: Callable[[], CausalLM],
    path: Path,
    store: str,
    share: float,
    text: Tensor,
    of: dict[str, Callable[[], CachePolicy | str]],
) -> list[dict[str, Any]]:
    runs: dict[str, list[Run]] = {name: [] for name in of}

    model = fresh()
    offload_experts(model, 1, path=path).close()

    def sample(name: str, number: int) -> None:
        opened = opened_as(path, store)
        slots = max(1, round(share * opened.num_banks * opened.num_experts))
        with ExpertCache(opened, slots, of[name]()) as cache:
            use(model, cache)
            runs[name].append(_timed(model, cache, text, plan.prompt))

    interleave(list(of), sample, lambda number: number < plan.rounds)
    cells = []
    for name, found in runs.items():
        seconds, wait, delays = zip(*_calmest(found), strict=True)
        steps = len(seconds)
        cells.append(
            {
                "policy": name,
                "store": store,
                "cache": share,
                "tokens_a_second": len(text) * steps / sum(seconds),
                "step_ms": 1e3 * sum(seconds) / steps,
                "wait_ms": 1e3 * sum(wait) / steps,
                "delay_ms": 1e3 * sum(delays) / steps,
                **{
                    key: statistics.fmean(run.counts[key] for run in found)
                    for key in found[0].counts
                },
            }
        )
    lru = next(cell["wait_ms"] for cell in cells if cell["policy"] == "LRU")
    for cell in cells:
        cell["hidden"] = 1 - cell["wait_ms"] / lru if lru else 0.0
    return cells


def use(model: CausalLM, cache: ExpertCache) -> None:
    """Replaces the expert cache of a model with offloaded experts."""
    for module in model.modules():
        if isinstance(module, OffloadedExperts):
            module.cache = cache
    model._forward_pre_hooks.clear()
    model.register_forward_pre_hook(lambda _, args: cache.begin(args[0]))


@dataclass
class Run:
    """One decoding run: for each step its seconds, the part spent waiting for experts, and the time
    that threads of this process waited for a core."""

    seconds: list[float]
    wait: list[float]
    delay: list[float]
    counts: dict[str, float]


def _calmest(runs: list[Run]) -> list[tuple[float, float, float]]:
    """Returns seconds, wait and delay of each step, from the run in which threads waited least for
    a core in that step: other processes take cores from all policies, and most from those of two
    threads."""
    found = []
    for step in range(len(runs[0].seconds)):
        run = min(runs, key=lambda run: run.delay[step])
        found.append((run.seconds[step], run.wait[step], run.delay[step]))
    return found


@torch.no_grad()
def _timed(model: CausalLM, cache: ExpertCache, text: Tensor, prompt: int) -> Run:
    kv = model.new_cache()
    model(text[:, :prompt], cache=kv, last=1)
    cache.reset_stats()
    run = Run([], [], [], {})
    waited, delay = 0.0, core_waits()
    for position in range(prompt, text.shape[1]):
        start = perf_counter()
        model(text[:, position : position + 1], cache=kv, last=1)
        run.seconds.append(perf_counter() - start)
        now, after = cache.stats.wait_seconds, core_waits()
        run.wait.append(now - waited)
        run.delay.append(after - delay)
        waited, delay = now, after
    stats, steps = cache.reset_stats(), len(run.seconds)
    loads = stats.misses + stats.fetched
    run.counts = {
        "hit_rate": stats.hits / stats.uses,
        "late": stats.late / stats.uses,
        "loads": loads / steps,
        "load_ms": 1e3 * stats.load_seconds / max(loads, 1),
        "predict_ms": 1e3 * stats.predict_seconds / steps,
    }
    return run


def core_waits() -> float:
    """Returns the seconds that threads of this process have waited for a core so far; 0 if the
    system does not report it."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):
            continue
    return total / 1e9
