"""The cost of a step of decoding beside its kernels: models of twelve layers, of hardly any width.

    python -m bench.whole_models.overhead --threads 1

Sizes are so small that the time of a step is that of Python, the dispatcher and the calls: what a
step of a real model pays on top of its kernels, once an operation at least. Times are of the
thread, the least of many steps. With --cold, 32 MiB are read before each layer, as if its weights
were: Python then waits for its data. The column forward leaves the time of reading out.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tests.helpers.quantized import weight_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import moe_ops.hf

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_COMMON, "num_experts": 8, "norm_topk_prob": True},
    "qwen2_moe": {**_COMMON, "num_experts": 8, "shared_expert_intermediate_size": 32},
    "mixtral": {**_COMMON, "num_local_experts": 8},
    "gpt_oss": {**_COMMON, "num_local_experts": 8, "sliding_window": 64},
    "deepseek_v3": {
        **_COMMON,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    },
}
BASELINES = ("eager", "float", "int8", "int4")


def build(name: str, baseline: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name])
    attention = "eager" if name == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(torch.bfloat16).eval()
    if baseline != "eager":
        weights = None if baseline == "float" else baseline
        moe_ops.hf.optimize(model, quantization=weight_config(weights, 32))
    return model


def read_before_layers(model: Any) -> list[float]:
    """Makes each layer read 32 MiB first, and returns the list that gets the seconds of reading."""
    data = torch.zeros(32 << 17, dtype=torch.int64)
    seconds: list[float] = []

    def reading(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            data.sum()
            seconds.append(time.thread_time() - start)
            return forward(*args, **kwargs)

        return run

    for layer in model.model.layers:
        layer.forward = reading(layer.forward)
    return seconds


@torch.no_grad()
def measure(model: Any, steps: int, cold: bool = False) -> tuple[float, float, int]:
    """Milliseconds of a forward of one token, of a step of `generate`, and calls of operations."""
    prompt = torch.randint(1, 256, (1, 16))
    cache = model(prompt, use_cache=True).past_key_values
    token = prompt[:, :1]
    forward = []
    reading = read_before_layers(model) if cold else []
    for _ in range(steps):
        reading.clear()
        start = time.thread_time()
        model(token, past_key_values=cache, use_cache=True)
        forward.append(time.thread_time() - start - sum(reading))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(token, past_key_values=cache, use_cache=True)
    calls = sum(event.count for event in recorded.key_averages())
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 1}
    whole = []
    for _ in range(3):
        times = []
        for length in (1, steps + 1):
            start = time.thread_time()
            model.generate(prompt, max_new_tokens=length, **options)
            times.append(time.thread_time() - start)
        whole.append((times[1] - times[0]) / steps)
    return min(forward) * 1e3, min(whole) * 1e3, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--baselines", default=",".join(BASELINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("model        baseline   forward ms  generate ms  calls")
    for name in args.models.split(","):
        for baseline in args.baselines.split(","):
            forward, whole, calls = measure(build(name, baseline), args.steps, args.cold)
            print(f"{name:12} {baseline:10} {forward:9.2f} {whole:12.2f} {calls:7}", flush=True)


if __name__ == "__main__":
    main()
