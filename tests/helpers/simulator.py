"""The CUDA kernels on the simulator of docs/cuda-without-a-gpu.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from moe_ops import _library
from moe_ops._private_torch import has_kernel, registered_ops
from moe_ops.ops._library import cuda_formulas

# Ops without a CUDA kernel, and what runs on CUDA in their place. Here they keep the CPU kernel.
CPU_ONLY = {
    "moe_ffn_lora_fwd": "the ops that layers/expert_adapters.py composes",
    "moe_ffn_lora_bwd": "the same",
}

_simulator: torch.library.Library | None = None


def use_simulator() -> None:
    """From now on, ``torch.ops.moe_ops`` runs the CUDA kernels on CPU tensors, on the simulator
    that stands in for the CUDA runtime. Autograd, fake and autocast rules stay what they are.

    Raises:
        RuntimeError: this build is not one with MOE_OPS_CUDART=shared, or lacks a kernel.
    """
    global _simulator
    if _simulator is not None:
        return
    if "shared" not in _library.build_info()["cuda"]:
        raise RuntimeError(
            "use_simulator: this build has no CUDA kernels for a simulator: build with "
            "MOE_OPS_CUDA=on and MOE_OPS_CUDART=shared (make test-sim does)."
        )
    names = registered_ops("moe_ops_sim")
    kernels = {name for name in names if has_kernel(f"moe_ops_sim::{name}", "cpu")}
    missing = sorted(set(names) - kernels - set(cuda_formulas) - set(CPU_ONLY))
    if missing:
        raise RuntimeError(f"use_simulator: no CUDA kernel for {', '.join(missing)}.")
    library = torch.library.Library("moe_ops", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
        for name in sorted(kernels):
            overload = getattr(torch.ops.moe_ops_sim, name).default
            library.impl(name, overload, "CPU", allow_override=True)
        for name, formula in cuda_formulas.items():
            library.impl(name, formula, "CPU", allow_override=True)
    _simulator = library


def run_script(name: str, *arguments: str) -> str:
    """Returns what tests/cuda/NAME.py prints, run in a process of its own."""
    script = Path(__file__).parents[1] / "cuda" / f"{name}.py"
    # It imports what this process imports, wherever pytest found it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def noticed_mutants(name: str) -> dict[str, str | None]:
    """Returns, for a script that breaks kernels, each mutant and how it was noticed, None if it was
    not."""
    noticed: dict[str, str | None] = json.loads(run_script(name))
    return noticed
