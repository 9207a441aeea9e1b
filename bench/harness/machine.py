"""The machine and time of a recorded result."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

from moe_ops import _library
from moe_ops.bench.machine import cpu_name


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": f"{cpu_name()}{_family()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": _caches(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "detected_isa": _library.detected_isa(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def load() -> list[float]:
    """Returns runnable processes, averages of 1 and 5 minutes, including this one."""
    return [round(value, 2) for value in os.getloadavg()[:2]] if hasattr(os, "getloadavg") else []


def beyond_isa() -> str | None:
    """Returns the reason why a library cannot run whose instruction set no environment variable
    lowers; None if it can."""
    held = _library.cpu_isa() != _library.detected_isa()
    return f"cannot be held to {_library.cpu_isa()}" if held else None


def _family() -> str:
    """Returns (family 25, model 17), if the system reports them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    numbers = []
    for name, key in (("family", "cpu family"), ("model", "model")):
        if number := re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE):
            numbers.append(f"{name} {number.group(1)}")
    return f" ({', '.join(numbers)})" if numbers else ""


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
