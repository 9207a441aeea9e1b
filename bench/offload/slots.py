"""Hit rates of `moe_ops.hf.place(cached_experts=N)` on recorded routes: ``python -m
bench.offload.slots``.

A small model is trained, and its routes are recorded while it reads held-out text byte by byte.
The least recently used of N experts per layer is evicted, as the cache does it. Experts are
counted, and nothing is timed: every copy ends before the next step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.harness.arguments import whole
from bench.offload.run import Plan, decode, make_model, texts
from moe_ops.offload import record_expert_trace
from moe_ops.offload.policy import LRUPolicy

PLAN = Plan(num_experts=64, top_k=4, tokens=256)
STREAMS = (1, 8)
SLOTS = (4, 8, 16, 32, 64)


def hit_rate(calls: Sequence[tuple[int, Sequence[int]]], num_slots: int) -> float:
    """Returns the fraction of the experts of these calls that have a slot when they are needed.

    Args:
        calls: layer and distinct experts of each call, in order. The slots are empty at first.
        num_slots: number of slots per layer, at least 1.
    """
    policy = LRUPolicy()
    slots: dict[int, set[int]] = {}
    hits = uses = 0
    for layer, experts in calls:
        cached = slots.setdefault(layer, set())
        policy.use(layer, experts)
        hits += len(cached.intersection(experts))
        uses += len(experts)
        # Those used last come first; experts of this call are not evicted for each other.
        for expert in reversed([e for e in experts if e not in cached]):
            if len(cached) == num_slots:
                others = [(layer, e) for e in cached if e not in experts]
                if not others:
                    break
                cached.remove(policy.victim(others)[1])
            cached.add(expert)
    return hits / uses if uses else 0.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.offload.slots", description=__doc__)
    parser.add_argument("--steps", type=whole(1, 10**5), help="of training")
    parser.add_argument("--tokens", type=whole(1, 10**5), help="of each stream")
    options = parser.parse_args(arguments)
    plan = replace(
        PLAN,
        train_steps=options.steps or PLAN.train_steps,
        tokens=options.tokens or PLAN.tokens,
    )
    torch.set_num_threads(1)
    model = make_model(plan)
    print("| streams | experts per call | " + " | ".join(f"N = {n}" for n in SLOTS) + " |")
    print("|---" * (2 + len(SLOTS)) + "|")
    for num_streams in STREAMS:
        with record_expert_trace(model) as recorder:
            decode(model, texts(plan, num_streams), plan.prompt)
        calls = recorder.trace().calls()[plan.num_layers :]  # Without the prompt.
        mean = sum(len(experts) for _, experts in calls) / len(calls)
        rates = [f"{hit_rate(calls, n):.0%}" for n in SLOTS]
        print(f"| {num_streams} | {mean:.1f} | " + " | ".join(rates) + " |")


if __name__ == "__main__":
    main()
