"""Training step of LoRA on all experts: moe_ops against peft's `target_parameters`.

    python -m bench.cpu.lora [--seconds 60] [--dtype float32] [--tokens 512]

The model is a Qwen3-MoE of four layers of 64 experts, four per token, with adapters of rank 8 on
both weights of each. It compares peft on transformers' own experts and on those of moe_ops,
`moe_ops.hf.lora.fuse_adapters`, and `fuse_adapters` on int8 and int4 experts. Times are of forward
and backward, interleaved in one process on one thread, and the minimum of each counts. Memory is
the maximum resident size of a separate process in two steps, and the part of it above the imports.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.helpers.quantized import weight_config
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops
from bench.harness.arguments import seconds, whole
from bench.harness.files import ROOT
from moe_ops.bench.timing import interleave
from moe_ops.hf import lora

SIZES = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
}
RANK, SEQUENCE = 8, 128
PEFT, FUSED = "peft", "moe_ops"
KINDS = (PEFT, "peft, experts of moe_ops", FUSED, "moe_ops int8", "moe_ops int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    """Returns the model with adapters; only they are trained."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, bos_token_id=0, eos_token_id=1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation("grouped_mm" if kind == PEFT else "moe_ops")
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": []}
    if " int" in kind:
        moe_ops.quantize(model, weight_config(kind.split()[1]))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(**options, target_parameters=targets))
    if kind.startswith(FUSED):
        lora.fuse_adapters(adapted)
    return adapted.train()


def step(model: nn.Module, ids: torch.Tensor) -> None:
    """Runs forward and backward; gradients are stored where the next step's will be."""
    model.zero_grad()
    model(ids, labels=ids).loss.backward()


def tokens(number: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (max(1, number // SEQUENCE), min(number, SEQUENCE)))


def times(kinds: list[str], dtype: torch.dtype, number: int, budget_s: float) -> dict[str, float]:
    """Returns minimum seconds of a step, over at least three steps of each beyond the first."""
    models = {kind: build(kind, dtype) for kind in kinds}
    ids, least = tokens(number), dict.fromkeys(kinds, float("inf"))
    end = time.perf_counter() + budget_s

    def sample(kind: str, turn: int) -> None:
        start = time.perf_counter()
        step(models[kind], ids)
        if turn:  # The first one warms up.
            least[kind] = min(least[kind], time.perf_counter() - start)

    interleave(kinds, sample, lambda turn: turn < 4 or time.perf_counter() < end)
    return least


def peak(kind: str, dtype: torch.dtype, number: int) -> dict[str, float]:
    """Returns maximum MiB in two steps, and MiB after imports; runs in a fresh process."""
    imports = _status_mib("VmRSS")
    model = build(kind, dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Quantized experts were float before.
    for _ in range(2):
        step(model, tokens(number))
    return {"imports": imports, "peak": _status_mib("VmHWM")}


def _status_mib(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def memory(kind: str, dtype: str, number: int) -> dict[str, float]:
    """Runs `peak` in a child process."""
    command = [sys.executable, "-m", "bench.cpu.lora", "--dtype", dtype, "--tokens", str(number)]
    child = subprocess.run(
        [*command, "--peak", kind], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.lora", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=seconds, default=60.0, help="of timing (60)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--tokens", type=whole(1, 1 << 16), default=512)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", choices=["times", "memory"], help="both unless given")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[options.dtype]
    if options.peak:
        print(json.dumps(peak(options.peak, dtype, options.tokens)))
        return
    if options.only != "memory":
        gc.disable()
        least = times(options.kinds, dtype, options.tokens, options.seconds)
        print("| | step, ms | of the first |\n|---|---|---|")
        for kind, best in least.items():
            print(f"| {kind} | {1e3 * best:.0f} | {best / least[options.kinds[0]]:.2f} |")
    if options.only != "times":
        sizes = {kind: memory(kind, options.dtype, options.tokens) for kind in options.kinds}
        first = sizes[options.kinds[0]]["peak"]
        print("| | peak, MiB | of the first | beyond imports |\n|---|---|---|---|")
        for kind, found in sizes.items():
            peak_mib, beyond = found["peak"], found["peak"] - found["imports"]
            print(f"| {kind} | {peak_mib:.0f} | {peak_mib / first:.2f} | {beyond:.0f} |")


if __name__ == "__main__":
    main()
