"""Step decode: a whole transformers model with random weights. Its experts run alternately on
moe_ops and on transformers' implementations, for a decode step in a CUDA graph and for `generate`.
moe_ops also runs without programmatic dependent launch and in batch-invariant mode.

The model has a few layers of Qwen3-30B-A3B's sizes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import moe_ops
from bench.gpu.clock import Clock, CudaClock, HostClock, Prepared
from bench.gpu.lease.child import UNFINISHED, Task
from bench.gpu.problem import relative
from bench.harness.files import rounded
from moe_ops.bench.measure import in_a_sentence

SERIAL, INVARIANT = "moe_ops, one by one", "moe_ops, batch-invariant"
WAYS = ("moe_ops", SERIAL, INVARIANT, "grouped_mm", "batched_mm", "eager")
_LAYERS, _PROMPT, _NEW = 4, 128, 64
_BATCHES = (1, 16)
# Tolerance of logits after some bf16 layers with different rounding.
_TOLERANCE = 0.05


def model_of(dry: bool, device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    wide |= {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    wide |= {"head_dim": 32, "vocab_size": 128, "num_hidden_layers": 1}
    if not dry:
        wide = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
        wide |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        wide |= {"head_dim": 128, "vocab_size": 32768, "num_hidden_layers": _LAYERS}
    config = Qwen3MoeConfig(**wide, intermediate_size=64, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def run(task: Task) -> tuple[int, str]:
    try:
        import transformers
    except ImportError:
        return 0, "left out: transformers is not installed"
    import moe_ops.hf  # noqa: F401  Registers the experts.

    end = time.perf_counter() + task.seconds
    clock: Clock = CudaClock() if task.device == "cuda" else HostClock()
    model = model_of(task.dry, task.device)
    done = {record["batch"] for record in task.journal.records("decode", task.step)}
    wrong = []
    for batch in (1,) if task.dry else _BATCHES:
        if batch in done:
            continue
        if time.perf_counter() > end:
            return UNFINISHED, f"the time was up before batch {batch}"
        found, skipped = _measure(model, clock, batch, task)
        task.journal.write(
            *("decode", task.step),
            **{"batch": batch, "layers": model.config.num_hidden_layers, "ways": rounded(found)},
            **{"skipped": skipped, "transformers": transformers.__version__},
        )
        print(f"batch {batch}: {found} {skipped or ''}", flush=True)
        wrong += [f"batch {batch}: {skipped['moe_ops']}"] if "moe_ops" in skipped else []
    return (1 if wrong else 0), "; ".join(wrong) or "decoding measured"


@torch.no_grad()
def _measure(
    model: Any, clock: Clock, batch: int, task: Task
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    prompt_size, new = (4, 3) if task.dry else (_PROMPT, _NEW)
    generator = torch.Generator().manual_seed(batch)
    size = (batch, prompt_size)
    prompt = torch.randint(3, model.config.vocab_size, size, generator=generator).to(task.device)
    truth: Tensor | None = None
    prepared: dict[str, Prepared] = {}
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for way in reversed(WAYS):  # eager is the reference of the others
        try:
            with _experts(model, way):
                logits = model(prompt).logits[:, -1].float()
                truth = logits if truth is None else truth
                error = relative(logits, truth)
                if not error <= _TOLERANCE:
                    skipped[way] = f"wrong: relative error {error:.1e}"
                    continue
                found[way] = {"error": error, "tokens_per_s": _generated(model, prompt, new, task)}
                prepared[way] = clock.prepare(_step(model, prompt, way))
        except Exception as problem:
            skipped[way] = in_a_sentence(problem)
    for way, samples in clock.rounds(prepared, 5).items():
        found[way]["step_us"] = samples.median * 1e6
        if prepared[way].note:
            found[way]["eager"] = prepared[way].note
    return found, skipped


@contextlib.contextmanager
def _experts(model: Any, way: str) -> Iterator[None]:
    """Runs the model's experts on this implementation; a CUDA graph keeps the one it captured."""
    model.set_experts_implementation(way.partition(",")[0])
    if way == SERIAL:
        os.environ["MOE_OPS_OVERLAP"] = "off"
    try:
        with moe_ops.batch_invariant(way == INVARIANT):
            yield
    finally:
        os.environ.pop("MOE_OPS_OVERLAP", None)


def _step(model: Any, prompt: Tensor, way: str) -> Any:
    """Returns the repeatable step after the prompt; a static cache keeps its addresses."""
    from transformers import StaticCache

    batch, length = prompt.shape
    cache = StaticCache(config=model.config, max_cache_len=length + 8)
    with _experts(model, way):
        model(prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, -1:].contiguous()
    position = torch.full((batch, 1), length, device=prompt.device)
    mask = torch.zeros(batch, 1, 1, length + 8, dtype=torch.bfloat16, device=prompt.device)
    mask[..., length + 1 :] = torch.finfo(torch.bfloat16).min

    def step() -> Tensor:
        with _experts(model, way), torch.no_grad():
            out = model(
                token,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits

    return step


def _generated(model: Any, prompt: Tensor, new: int, task: Task) -> float:
    """Returns tokens per second of greedy `generate`, by the host's clock: the second of two
    calls."""
    seconds = 0.0
    for _ in range(2):
        task.wait()
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        task.wait()
        seconds = time.perf_counter() - started
    return prompt.shape[0] * new / seconds


def table(records: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for r in records:
        for way in WAYS:
            if way in r["ways"]:
                own = r["ways"][way]
                step = f"{own['step_us']:.4g}" if "step_us" in own else "–"
                step += "*" if "eager" in own else ""
                rows.append([str(r["batch"]), way, step, f"{own['tokens_per_s']:.4g}"])
            elif way in r["skipped"]:
                rows.append([str(r["batch"]), way, "–", f"– ({r['skipped'][way]})"])
    header = ["batch", "experts", "step us", "tokens/s"]
    return "Decoding with a model of transformers", header, rows
