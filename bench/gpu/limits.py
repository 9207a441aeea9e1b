"""Limits of the GPU, measured in each run: cuBLAS, a copy, the shortest launch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.gpu.clock import Clock, Job


@dataclass(frozen=True)
class Limits:
    """Limits of a GPU. bf16_flops: a square cuBLAS GEMM. copy_bytes: read and written by a copy
    between two buffers far larger than the cache. launch_s: a graph with one nearly empty kernel.
    fp8_flops: cuBLAS in e4m3, 0 if not requested or not supported."""

    bf16_flops: float
    copy_bytes: float
    launch_s: float
    fp8_flops: float = 0.0

    def flops(self, dtype: str) -> float:
        return self.fp8_flops or self.bf16_flops if dtype == "fp8" else self.bf16_flops

    def best(self, other: Limits) -> Limits:
        """Returns the better of two measurements: other load and heat only lower a rate."""
        return Limits(
            max(self.bf16_flops, other.bf16_flops),
            max(self.copy_bytes, other.copy_bytes),
            min(self.launch_s, other.launch_s),
            max(self.fp8_flops, other.fp8_flops),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(clock: Clock, *, tiny: bool = False, fp8: bool = False) -> Limits:
    """Returns medians of 15 interleaved rounds."""
    n, size = (256, 1 << 20) if tiny else (8192, 1 << 30)
    seconds = _measure(clock, n, size, fp8)
    clock.release()
    flops = 2.0 * n**3
    return Limits(
        bf16_flops=flops / seconds["bf16"],
        copy_bytes=2.0 * size / seconds["copy"],
        launch_s=seconds["launch"],
        fp8_flops=flops / seconds["fp8"] if "fp8" in seconds else 0.0,
    )


def _measure(clock: Clock, n: int, size: int, fp8: bool) -> dict[str, float]:
    device = clock.device
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    jobs: dict[str, Job] = {
        "bf16": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
        "launch": lambda: one.zero_(),
    }
    if fp8:
        a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b))
        scale = torch.ones((), device=device)
        jobs["fp8"] = lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )
    prepared = {}
    for name, job in jobs.items():
        try:
            prepared[name] = clock.prepare(job)
        except Exception:
            if name != "fp8":  # Not every GPU has it.
                raise
    return {name: sample.median for name, sample in clock.rounds(prepared, 15).items()}
