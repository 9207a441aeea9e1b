"""Step cached: decoding with a transformers model whose experts are on the CPU, without and with a
cache of experts on the GPU (`moe_ops.hf.place`), in bfloat16 and int4.

The model is that of step decode. Its routers have random weights, so that its hit rates say nothing
about a trained model; the times for several hit rates do.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import moe_ops
from bench.gpu.lease.child import Task
from bench.gpu.lease.placed import Measure, run_cases
from bench.gpu.problem import relative

_SLOTS = (0, 4, 8, 16, 32, 64, 128)
_PROMPT, _WARM_UP, _STEPS = 16, 64, 64


def run(task: Task) -> tuple[int, str]:
    def measure_of(model: Any) -> Measure:
        truth = _measure(model, 0, task)[1]

        def measure(slots: int) -> dict[str, float]:
            found, logits = _measure(model, slots, task)
            return {**found, "error": relative(logits, truth)}

        return measure

    return run_cases(task, "cached", "slots", (0, 4) if task.dry else _SLOTS, measure_of)


@torch.no_grad()
def _measure(model: Any, slots: int, task: Task) -> tuple[dict[str, float], Tensor]:
    """Returns times and hit rate of the steps after those that fill the slots, and the logits of
    the last one. All runs read the same tokens."""
    moe_ops.hf.place(model, task.device, cached_experts=slots or None)
    warm_up, steps = (4, 3) if task.dry else (_WARM_UP, _STEPS)
    generator = torch.Generator().manual_seed(0)
    size = (1, _PROMPT + warm_up + steps)
    tokens = torch.randint(3, model.config.vocab_size, size, generator=generator).to(task.device)
    caches = [m.expert_cache for m in model.modules() if getattr(m, "expert_cache", None)]
    out = model(tokens[:, :_PROMPT], use_cache=True)
    started, before = 0.0, (0, 0, 0)
    for step in range(warm_up + steps):
        if step == warm_up:
            task.wait()
            started, before = time.perf_counter(), _counts(caches)
        token = tokens[:, _PROMPT + step : _PROMPT + step + 1]
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    task.wait()
    seconds = time.perf_counter() - started
    hits, misses, copies = (a - b for a, b in zip(_counts(caches), before, strict=True))
    found = {
        "step_ms": 1e3 * seconds / steps,
        "hit_rate": hits / max(1, hits + misses),
        "copies_per_step": copies / steps,
    }
    return found, out.logits[:, -1].float()


def _counts(caches: list[Any]) -> tuple[int, int, int]:
    return (
        sum(c.hits for c in caches),
        sum(c.misses for c in caches),
        sum(c.copies for c in caches),
    )


def table(records: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for r in records:
        numbers = [f"{r['step_ms']:.4g}", f"{r['hit_rate']:.0%}", f"{r['copies_per_step']:.3g}"]
        rows.append([r["format"], str(r["slots"]), *numbers])
    header = ["experts", "slots per layer", "ms per step", "hit rate", "copies per step"]
    return "Decoding with experts on the CPU and a cache on the GPU", header, rows
