"""Run as a process of its own: loads a model of transformers whose experts go to files meanwhile.

    python limited_transformers.py FOLDER NUM_SLOTS

While it loads, this process may have the mapped checkpoint, the dense weights and the experts of
two layers. RLIMIT_DATA counts all memory that is private and writable, such mappings too.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import moe_ops.hf


def of_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def load(folder: Path, num_slots: int) -> Any:
    experts = folder / "experts"
    offload = {"num_slots": num_slots}
    return moe_ops.hf.load_offloaded(AutoModelForCausalLM, folder, experts, offload=offload)


def generate(model: Any, prompt: torch.Tensor, num: int) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=num, do_sample=False)


def main(folder: Path, num_slots: int) -> None:
    threading.stack_size(1 << 20)
    task = torch.load(folder / "task.pt", weights_only=True)
    # The code of libraries, and what they set up at a first use, is not the model's.
    small = load(folder / "small", 2)
    generate(small, task["prompt"], 1)
    small.expert_cache.close()
    Path("/proc/self/clear_refs").write_text("5")  # The peak so far is forgotten.
    before = of_status("VmRSS")
    mapped = (folder / "model.safetensors").stat().st_size
    limit = of_status("VmData") + mapped + task["dense_bytes"] + 2 * task["layer_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model = load(folder, num_slots)
    peak = of_status("VmHWM") - before
    tokens = generate(model, task["prompt"], task["num_tokens"])
    model.expert_cache.close()
    print(json.dumps({"tokens": tokens.tolist(), "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
