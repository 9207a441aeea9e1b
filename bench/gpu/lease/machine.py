"""Step machine: description of the machine. Needs no build."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from bench.gpu.card import describe_card
from bench.gpu.lease.child import Task
from bench.gpu.steps import said

_PACKAGES = ("triton", "transformers", "pytest", "pytest-xdist", "expecttest")
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks.applications.graphics"


def run(task: Task) -> tuple[int, str]:
    device = torch.device(task.device)
    card = describe_card(device)
    facts: dict[str, Any] = {
        "card": card,
        "clocks": said(["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv"]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "nvcc": said(["nvcc", "--version"])[-1:],
        "cmake": said(["cmake", "--version"])[:1],
        "compiler": said(["c++", "--version"])[:1],
        "compute_sanitizer": said(["compute-sanitizer", "--version"])[-1:],
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    task.journal.write("machine", task.step, **facts)
    driver = f", driver {card['driver']}" if "driver" in card else ""
    return 0, f"{card['name']}{driver}, torch {torch.__version__}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
