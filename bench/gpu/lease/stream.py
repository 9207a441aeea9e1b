"""Step stream: a prompt of a transformers model whose experts are on the CPU (`moe_ops.hf.place`),
with the experts computed there and streamed to the GPU, in bfloat16 and int4.

The model is that of step decode. From the two times follows the number of tokens from which
streaming is faster.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

import moe_ops
from bench.gpu.lease.child import Task
from bench.gpu.lease.placed import run_cases
from bench.gpu.problem import relative

_TOKENS = (256, 1024, 4096)
_ROUNDS = 3


def run(task: Task) -> tuple[int, str]:
    sizes = (16,) if task.dry else _TOKENS
    return run_cases(task, "stream", "tokens", sizes, lambda m: partial(_measure, task, m))


@torch.no_grad()
def _measure(task: Task, model: Any, tokens: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(tokens)
    size = (1, tokens)
    prompt = torch.randint(3, model.config.vocab_size, size, generator=generator).to(task.device)
    seconds, logits = {}, {}
    for way, least in (("cpu", None), ("streamed", 1)):
        moe_ops.hf.place(model, task.device, stream_min_tokens=least)
        logits[way] = model(prompt).logits[:, -1].float()
        rounds = []
        for _ in range(_ROUNDS):
            task.wait()
            started = time.perf_counter()
            model(prompt)
            task.wait()
            rounds.append(time.perf_counter() - started)
        seconds[way] = min(rounds)
    return {
        "cpu_s": seconds["cpu"],
        "streamed_s": seconds["streamed"],
        "crossover": tokens * seconds["streamed"] / seconds["cpu"],
        "error": relative(logits["streamed"], logits["cpu"]),
    }


def table(records: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for r in records:
        numbers = [f"{r[name]:.4g}" for name in ("cpu_s", "streamed_s", "crossover")]
        rows.append([r["format"], str(r["tokens"]), *numbers])
    header = ["experts", "tokens", "CPU s", "streamed s", "streamed / CPU x tokens"]
    return "A prompt with experts on the CPU", header, rows
