"""Step stream: a prompt of a transformers model whose experts are on the CPU (`moe_ops.hf.place`),
with the experts computed there and streamed to the GPU, in bfloat16 and int4.

The model is that of step decode. From the two times follows the number of tokens from which
streaming is faster.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import moe_ops
from bench.gpu.lease.child import UNFINISHED, Task
from bench.gpu.lease.decode import model_of
from bench.gpu.problem import relative
from bench.harness.files import rounded

_TOKENS = (256, 1024, 4096)
_ROUNDS = 3
# Tolerance of logits: the CPU's int4 kernels round tokens to 8 bits.
_TOLERANCE = 0.1


def run(task: Task) -> tuple[int, str]:
    try:
        import moe_ops.hf
    except ImportError:
        return 0, "left out: transformers is not installed"
    end = time.perf_counter() + task.seconds
    done = {(r["format"], r["tokens"]) for r in task.journal.records("stream", task.step)}
    wrong = []
    for config in (None, moe_ops.Int4WeightConfig()):
        label = "bfloat16" if config is None else config.label
        cases = [t for t in ((16,) if task.dry else _TOKENS) if (label, t) not in done]
        if not cases:
            continue
        model = model_of(task.dry, "cpu")
        started = time.perf_counter()
        moe_ops.hf.place(model, task.device, quantization=config, stream_min_tokens=1)
        place_s = time.perf_counter() - started
        for tokens in cases:
            if time.perf_counter() > end:
                return UNFINISHED, f"the time was up before {tokens} tokens in {label}"
            found = _measure(model, tokens, task)
            task.journal.write(
                *("stream", task.step),
                **{"format": label, "tokens": tokens, "place_s": round(place_s, 2)},
                **rounded(found),
            )
            print(f"{label}, {tokens} tokens: {found}", flush=True)
            if not found["error"] <= _TOLERANCE:
                wrong.append(f"{label}, {tokens} tokens: relative error {found['error']:.1e}")
    return (1 if wrong else 0), "; ".join(wrong) or "streaming measured"


@torch.no_grad()
def _measure(model: Any, tokens: int, task: Task) -> dict[str, float]:
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
