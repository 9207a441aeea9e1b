"""The processor, and the environment that holds every library to an instruction set."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

# What holds torch, oneDNN and MKL to the instruction set of MOE_OPS_CPU_ISA.
ISA_ENVIRONMENTS = {
    "avx2": {
        "MOE_OPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def hold_to_isa(isa: str | None) -> None:
    """Executes this command again in the environment that holds everything to `isa`, unless this
    process was started in it."""
    wanted = ISA_ENVIRONMENTS[isa] if isa else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cpu_name() -> str:
    """Its name and, where the system tells them, family and model."""
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
