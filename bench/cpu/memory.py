"""Peak memory of a training step beyond weights and gradients.

Each baseline runs in its own process: the kernel records the maximum resident size of a process
(VmHWM), which writing to /proc/self/clear_refs resets. After one warm-up step, a second step is
measured; the result is its peak above weights and gradients. Workspaces and caches that a library
keeps between steps count as its own.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cpu.kept import MEASURED
from bench.harness.files import ROOT
from moe_ops import _library
from moe_ops.bench.baselines import skipped_steps
from moe_ops.bench.shapes import DTYPES, SHAPES, Bank, Shape, make_bank, make_tokens
from moe_ops.memory import use_huge_pages

BASELINES = ("moe_ops", "moe_ops main_grads", "HF grouped_mm", "HF grouped_mm kept .grad")


def measure_memory(shape: str, dtype: str, num_tokens: int) -> dict[str, Any]:
    """Returns MiB of each baseline, from one child process each; `skipped` has the reasons for
    missing ones."""
    result: dict[str, Any] = {"shape": shape, "weights": dtype, "T": num_tokens}
    result |= {"mib": {}, "skipped": {}}
    for name in BASELINES:
        command = [sys.executable, "-m", "bench.cpu.memory", shape, dtype, str(num_tokens)]
        child = subprocess.run(
            [*command, name], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if child.returncode == 0:
            result["mib"][name] = json.loads(child.stdout)["beyond_bytes"] / 2**20
        else:
            lines = child.stderr.strip().splitlines() or ["it ended without a word"]
            result["skipped"][name] = lines[-1]
    return result


def beyond(shape: str, dtype: str, num_tokens: int, name: str) -> dict[str, int]:
    """Returns resident bytes of a step above the process, weights and gradients; runs in a fresh
    process."""
    torch.set_num_threads(1)
    _warm_up_torch()
    gc.collect()
    before = _status("VmRSS")
    sizes = SHAPES[shape]
    bank = Bank(  # Values do not affect memory.
        sizes,
        torch.full((sizes.E, 2 * sizes.I, sizes.H), 0.01, dtype=DTYPES[dtype]),
        torch.full((sizes.E, sizes.H, sizes.I), 0.01, dtype=DTYPES[dtype]),
    )
    if name.startswith("moe_ops"):
        use_huge_pages(bank.w_gate_up, bank.w_down)
    tokens = make_tokens(SHAPES[shape], DTYPES[dtype], num_tokens)
    grad_y = torch.randn(tokens.x.shape).to(bank.dtype)
    step = MEASURED[name](bank, tokens, grad_y)
    step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    weights = sum(w.numel() * w.element_size() for w in (bank.w_gate_up, bank.w_down))
    inputs = 2 * tokens.x.numel() * tokens.x.element_size()
    used = _status("VmHWM") - before - inputs
    return {"beyond_bytes": used - 2 * weights, "weight_bytes": weights}


def _warm_up_torch() -> None:
    """Loads the libraries that the first GEMM and the first backward pass load, and keeps nothing
    else."""
    tiny = Shape("tiny", 64, 64, 2, 1)
    bank, tokens = make_bank(tiny, torch.float32), make_tokens(tiny, torch.float32, 4)
    for name, make in MEASURED.items():
        if not (name.startswith("HF") and skipped_steps()):
            make(bank, tokens, torch.randn(tokens.x.shape))()
    _library.release_cached()


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    shape_name, dtype_name, count, baseline = sys.argv[1:]
    if not os.path.exists("/proc/self/clear_refs"):
        sys.exit("the system has no /proc/self/clear_refs")
    print(json.dumps(beyond(shape_name, dtype_name, int(count), baseline)))
