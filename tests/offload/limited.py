"""Run as a process of its own: generates with experts larger than the memory that it may have.

    python limited.py FOLDER NUM_SLOTS POLICY

The limit counts all memory that is private and writable (RLIMIT_DATA), touched or not. While the
model is loaded it is what this process has, the files, which safetensors maps privately, the budget
and a tenth of it. Afterwards it is what there is, and a tenth of the budget more. The peak of what
is touched is of loading too.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from moe_ops.offload import BeladyPolicy, ExpertTrace, PredictivePolicy
from moe_ops.zoo.deepseek import DeepSeek


def of_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def run(folder: Path, num_slots: int, policy: Any, prompt: torch.Tensor, num: int) -> DeepSeek:
    model = DeepSeek.from_pretrained(folder, offload={"num_slots": num_slots, "policy": policy})
    model.generate(prompt, num)
    return model


def main(folder: Path, num_slots: int, policy: str) -> None:
    threading.stack_size(1 << 20)
    task = torch.load(folder / "task.pt", weights_only=True)
    chosen = BeladyPolicy(ExpertTrace.load(folder / "trace.npz")) if policy == "belady" else policy
    # The code of libraries, and what they set up at a first use, is not the model's.
    small = PredictivePolicy(lambda _: torch.ones(1, 32)) if policy == "belady" else "lru"
    run(folder / "small", 2, small, task["prompt"], 1).expert_cache.close()
    Path("/proc/self/clear_refs").write_text("5")  # The peak so far is forgotten.
    before = of_status("VmRSS")
    rest, expert = task["rest_bytes"], task["expert_bytes"]
    budget = rest + num_slots * expert
    mapped = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = of_status("VmData") + mapped + budget + budget // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    model = run(folder, num_slots, chosen, task["prompt"][:, :1], 0)
    limit = of_status("VmData") + budget // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokens = model.generate(task["prompt"], task["num_tokens"])
    peak = of_status("VmHWM") - before
    cache = model.expert_cache
    stats = cache.stats
    cache.close()
    try:
        torch.empty(task["all_bytes"] - num_slots * expert, dtype=torch.uint8)
        fits = True
    except RuntimeError:  # torch has no error of its own for memory of the CPU.
        fits = False
    print(
        json.dumps(
            {
                "tokens": tokens.tolist(),
                "peak": peak,
                "budget": budget,
                "others_fit": fits,
                "misses": stats.misses,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
