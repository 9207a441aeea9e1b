"""What a report says about where and when it was made."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moe_ops import _C
from moe_ops.bench.baselines import Baseline

# What holds torch, oneDNN and MKL to the instruction set of MOE_OPS_CPU_ISA.
ISA_ENVIRONMENTS = {
    "avx2": {
        "MOE_OPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": _caches(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "detected_isa": _C.detected_isa(),
    }


def describe_software(baselines: Iterable[Baseline]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for baseline in baselines:
        if baseline.missing() is None and baseline.package != "torch":
            versions[baseline.package] = baseline.version()
    return versions


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def load() -> list[float]:
    """Runnable processes, averages of 1 and 5 minutes; ours is one of them."""
    return [round(value, 2) for value in os.getloadavg()[:2]] if hasattr(os, "getloadavg") else []


def hold_to_isa(isa: str | None) -> None:
    """Executes this command again in the environment that holds everything to `isa`, unless this
    process was started in it."""
    wanted = ISA_ENVIRONMENTS[isa] if isa else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    numbers = [
        re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")
    ]
    where = [
        f"{key} {n.group(1)}" for key, n in zip(("family", "model"), numbers, strict=True) if n
    ]
    described = name.group(1).strip() if name else platform.processor()
    return f"{described} ({', '.join(where)})" if where else described


def _caches() -> str:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
