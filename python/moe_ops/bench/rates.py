"""The rates of this machine that `moe-ops plan --vram` computes with; a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ops import ops
from moe_ops.bench.limits import measure_limits
from moe_ops.bench.shapes import Shape, flops, make_bank, make_tokens
from moe_ops.parallel.plan.machine import LAYER

# GEMMs of 256 tokens per expert: as many as prompts of thousands of tokens have.
_LAYER = Shape("rates", 1024, 1024, 8, 2)
_TOKENS = 1024
_SECONDS = 0.3
_LEAST_BYTES = 512 << 20
# One token with few or many experts of 2.4 MB, like a step of decoding.
_DECODE = Shape("decode", 1024, 384, 0, 0)
_FEW, _MANY = 4, 32
_COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Rates:
    """Rates of this machine with torch's number of threads, in bytes and operations per second.

    Attributes:
        threads: that number.
        read: a plain read of a buffer that is larger than the last-level cache.
        bandwidth: reads of bfloat16 experts by `moe_ops.moe_ffn` of one token, from as many weights
            in ordinary pages; the increase of the time with the number of experts.
        call: seconds of such a call without its reads: those of starting the threads.
        bf16_flops, fp32_flops: grouped GEMMs of `moe_ops.moe_ffn`.
        pcie, gpu_bandwidth: copies from pinned memory to the GPU, and reads and writes of a copy
            inside its memory; None without CUDA.
    """

    threads: int
    read: float
    bandwidth: float
    call: float
    bf16_flops: float
    fp32_flops: float
    pcie: float | None
    gpu_bandwidth: float | None

    def options(self) -> dict[str, float]:
        """Returns the options of `moe-ops plan` with these values."""
        found = {
            "bandwidth": self.bandwidth / 1e9,
            # Attention and the experts of a layer are a call each.
            "overhead": (LAYER + 2 * self.call) * 1e6,
            "tflops": self.bf16_flops / 1e12,
            "pcie": None if self.pcie is None else self.pcie / 1e9,
            "gpu-bandwidth": None if self.gpu_bandwidth is None else self.gpu_bandwidth / 1e9,
        }
        return {name: float(f"{value:.3g}") for name, value in found.items() if value is not None}


def measure_rates() -> Rates:
    """Measures all rates; other programs that run at this time lower them."""
    threads = torch.get_num_threads()
    total = max(2 * _LEAST_BYTES, 2 * _last_level_cache())
    buffer = total // threads
    read = measure_limits(threads, seconds=_SECONDS, buffer_bytes=buffer).read_bytes
    pcie = gpu = None
    if torch.cuda.is_available():
        pinned = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        here = torch.empty_like(pinned, device="cuda")
        there = torch.empty_like(here)
        pcie = _copy_rate(here, pinned)
        gpu = 2 * _copy_rate(there, here)  # A copy reads and writes.
    bandwidth, call = _decode(total)
    return Rates(
        threads, read, bandwidth, call, _gemm(torch.bfloat16), _gemm(torch.float32), pcie, gpu
    )


def _decode(total: int) -> tuple[float, float]:
    """Returns bytes per second and seconds per call of `moe_ffn` with one token."""
    h, i = _DECODE.H, _DECODE.I
    each = 3 * h * i * 2
    number = max(_MANY, total // each // _MANY * _MANY)
    w_gate_up = torch.zeros(number, 2 * i, h, dtype=torch.bfloat16).fill_(0.01)
    w_down = torch.zeros(number, h, i, dtype=torch.bfloat16).fill_(0.01)
    x = torch.ones(1, h, dtype=torch.bfloat16)
    seconds = {}
    for top_k in (_FEW, _MANY):
        weights = torch.full((1, top_k), 1 / top_k)
        times = []
        for ids in torch.arange(number).view(-1, 1, top_k):
            start = time.perf_counter()
            ops.moe_ffn(x, w_gate_up, w_down, weights, ids)
            times.append(time.perf_counter() - start)
        seconds[top_k] = statistics.median(times)
    # Noise may make the longer call the faster one; then the rate of that call counts.
    slope = (seconds[_MANY] - seconds[_FEW]) / (_MANY - _FEW)
    slope = slope if slope > 0 else seconds[_MANY] / _MANY
    return each / slope, max(0.0, seconds[_FEW] - _FEW * slope)


def _gemm(dtype: torch.dtype) -> float:
    bank = make_bank(_LAYER, dtype)
    tokens = make_tokens(_LAYER, dtype, _TOKENS)
    weights = tokens.topk_weights.float()

    def run() -> object:
        return ops.moe_ffn(tokens.x, bank.w_gate_up, bank.w_down, weights, tokens.topk_ids)

    return flops(_LAYER, _TOKENS) / _least(run)


def _copy_rate(target: torch.Tensor, source: torch.Tensor) -> float:
    def run() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return source.nbytes / _least(run)


def _least(run: Callable[[], object]) -> float:
    """Returns the least seconds of a call, of at least three."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _last_level_cache() -> int:
    """Returns the bytes of all last-level caches together; 0 where the system does not state it."""
    sizes: dict[str, int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            text = (folder / "size").read_text().strip()
            sizes[(folder / "shared_cpu_list").read_text()] = int(text.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(sizes.values())
