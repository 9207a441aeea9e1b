"""The GPU's name and its clock during a run, from periodic nvidia-smi queries."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import threading
from typing import Any

import torch

_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
# Bits of the last field. The first two are not slowdowns: idle, or clocks set by applications.
_IDLE, _SET = 0x1, 0x2
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def slug(name: str) -> str:
    """Returns a GPU's file name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "none (walk on the CPU)"}
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
    for key, field in (("driver", "driver_version"), ("power_limit_w", "power.limit")):
        values = _ask(device, field)
        if values:
            facts[key] = values[0]
    values = _ask(device, "clocks.max.sm")
    if values:
        facts["max_sm_mhz"] = int(float(values[0]))
    return facts


class Watch:
    """Samples clock, power and temperature every few seconds until it is stopped."""

    def __init__(self, device: torch.device, every_s: float = 3.0) -> None:
        self._device, self._every_s = device, every_s
        self._samples: list[tuple[float, float, float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if device.type == "cuda":
            self._thread.start()

    def stop(self) -> dict[str, Any]:
        """Stops sampling and returns statistics of the samples with a busy GPU."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        return summarize(self._samples)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            sample = parse_sample(_ask(self._device, *_FIELDS))
            if sample is not None:
                self._samples.append(sample)


def parse_sample(values: list[str]) -> tuple[float, float, float, int] | None:
    """Returns (MHz, W, C, reasons) of a line of nvidia-smi; None if a field is missing."""
    try:
        mhz, watts, celsius, reasons = values
        return float(mhz), float(watts), float(celsius), int(reasons, 16)
    except ValueError:
        return None


def summarize(samples: list[tuple[float, float, float, int]]) -> dict[str, Any]:
    busy = [s for s in samples if not s[3] & _IDLE]
    if not busy:
        return {"samples": 0, "note": "nvidia-smi told nothing"}
    mhz = [s[0] for s in busy]
    counts = {
        name: sum(1 for s in busy if s[3] & bit)
        for bit, name in _REASONS.items()
        if any(s[3] & bit for s in busy)
    }
    slowed = ", ".join(f"{name} in {n} of {len(busy)} samples" for name, n in counts.items())
    note = f"SM clock {min(mhz):.0f} to {max(mhz):.0f} MHz; {slowed or 'not throttled'}"
    if any(s[3] & _SET for s in busy):
        note += "; clocks were set by hand"
    return {
        "samples": len(busy),
        "sm_mhz": {"min": min(mhz), "median": statistics.median(mhz), "max": max(mhz)},
        "power_w_max": max(s[1] for s in busy),
        "temperature_c_max": max(s[2] for s in busy),
        "note": note,
    }


def _ask(device: torch.device, *fields: str) -> list[str]:
    """Returns fields of nvidia-smi for a device; empty if it is unavailable."""
    if shutil.which("nvidia-smi") is None:
        return []
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    # If nvidia-smi knows the GPU by another name, use the first one it lists.
    for which in (["-i", f"GPU-{uuid}"], []):
        try:
            done = subprocess.run(
                ["nvidia-smi", *which, *query],
                capture_output=True,
                text=True,
                check=False,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode == 0 and done.stdout.strip():
            return [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return []
