"""The processor, and the environment that restricts every library to an instruction set."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

# Restricts torch, oneDNN and MKL to the instruction set of MOE_OPS_CPU_ISA.
ISA_ENVIRONMENTS = {
    "avx2": {
        "MOE_OPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def hold_to_isa(isa: str | None) -> None:
    """Executes this command again in the environment that restricts every library to `isa`, unless
    this process was started in it."""
    wanted = ISA_ENVIRONMENTS[isa] if isa else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cpu_name() -> str:
    """Returns the processor's name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name.group(1).strip() if name else platform.processor()
