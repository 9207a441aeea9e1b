"""kt-kernel, the CPU experts of KTransformers, on processors with AMX or AVX-512 for bf16.

    pip install --no-deps kt-kernel
    taskset -c 1 python -m bench.cpu --modes forward quantized ...

Weights are bf16 (rounded to int8 or int4 with a scale per row by the library itself), or int4 in
groups of 32 with bf16 scales, fp8 in blocks of 128 x 128 and MXFP4 as `bench.cpu.quantized` rounds
them. The library computes in threads of its own, which it binds to the first cores, and its caller
waits in a loop: the process must run on other cores. The layer is called without the library's task
queue, whose thread would need another core. The library prints to standard output.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cpu.quantized import quantize
from bench.harness.machine import beyond_isa
from moe_ops import _library
from moe_ops.bench.baselines import Baseline, Bind, Call
from moe_ops.bench.shapes import Bank, Tokens

_TASKS = Path("/proc/self/task")
_MOST_TOKENS = 2048


def missing() -> str | None:
    """Returns the reason why the library cannot run in this process; None if it can."""
    if importlib.util.find_spec("kt_kernel") is None:
        return "kt-kernel is not installed"
    if _library.detected_isa() not in ("amx", "avx512_bf16"):
        return "kt-kernel is compared on processors with AMX or AVX-512 for bf16 only"
    return beyond_isa()


class KTKernel(Baseline):
    """kt-kernel baseline. `layer` is the name of the library's class."""

    KINDS = (
        ("bf16", "bf16", "AMXBF16_MOE"),
        ("int8", "int8", "AMXInt8_MOE"),
        ("int4", "int4 rows", "AMXInt4_MOE"),
        ("int4", "int4 groups", "AMXInt4_KGroup_MOE"),
        ("fp8", "fp8", "AMXFP8_MOE"),
        ("mxfp4", "mxfp4", "AMXFP4_KGroup_MOE"),
    )
    package = "kt-kernel"

    def __init__(self, weight_format: str, kind: str, layer: str) -> None:
        self.formats, self.layer = (weight_format,), layer
        self.name = f"kt-kernel {kind}"

    def missing(self) -> str | None:
        return missing()

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        import kt_kernel

        pool = worker_pool(torch.get_num_threads())
        shape = bank.shape
        config = kt_kernel.kt_kernel_ext.moe.MOEConfig(shape.E, shape.K, shape.H, shape.I, 0)
        config.pool, config.max_len = pool.backend_, _MOST_TOKENS
        parts = (*bank.w_gate_up.chunk(2, dim=1), bank.w_down)
        rounds_itself = self.layer in ("AMXInt8_MOE", "AMXInt4_MOE")
        kept: list[Tensor] = []  # The library keeps addresses.
        for name, w in zip(("gate", "up", "down"), parts, strict=True):
            if rounds_itself:
                kept.append(w.contiguous())
                setattr(config, f"{name}_proj", kept[-1].data_ptr())
                continue
            codes, scales = _codes(w, weight_format)
            kept += [codes, scales]
            setattr(config, f"{name}_projs", [[c.data_ptr() for c in codes]])
            setattr(config, f"{name}_scales", [[s.data_ptr() for s in scales]])
        if not rounds_itself and weight_format != "bf16":
            config.quant_config.bits = 8 if weight_format == "fp8" else 4
            config.quant_config.group_size = 128 if weight_format == "fp8" else 32
            config.quant_config.zero_point = False
        layer = getattr(kt_kernel.kt_kernel_ext.moe, self.layer)(config)
        order = torch.arange(shape.E)
        pool.submit(layer.load_weights_task(order.data_ptr()))
        pool.sync()

        def bind(tokens: Tokens) -> Call:
            if tokens.count > _MOST_TOKENS:
                raise ValueError(f"at most {_MOST_TOKENS} tokens, got {tokens.count}")
            count = torch.tensor([tokens.count], dtype=torch.int32)
            ids, weights = tokens.topk_ids.long(), tokens.topk_weights.contiguous()
            x, y = tokens.x.contiguous(), torch.empty_like(tokens.x)

            def call() -> Tensor:
                assert kept
                layer.forward(
                    count.data_ptr(),
                    shape.K,
                    ids.data_ptr(),
                    weights.data_ptr(),
                    x.data_ptr(),
                    y.data_ptr(),
                    False,
                )
                return y

            return call

        return bind


@functools.cache
def worker_pool(num_threads: int) -> Any:
    """Starts the library's threads, which no thread of this process may share a core with."""
    import kt_kernel

    config = kt_kernel.kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map = 1, [0]
    config.subpool_thread_count = [num_threads]
    pool = kt_kernel.kt_kernel_ext.CPUInfer(config)
    for _ in range(100):  # They start on this process's cores.
        workers = [t for t in _TASKS.iterdir() if (t / "comm").read_text().startswith("numa_")]
        taken = set[int]().union(*(os.sched_getaffinity(int(t.name)) for t in workers))
        if not (shared := taken & os.sched_getaffinity(0)):
            return pool
        time.sleep(0.01)
    raise RuntimeError(
        f"its thread is bound to core {min(shared)}, where this process runs too: start the "
        "process on other cores (taskset)"
    )


def _codes(w: Tensor, weight_format: str) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of [E, O, D] as the library reads them."""
    if weight_format == "bf16":
        return w.contiguous(), w.new_zeros(w.shape[0], 1)
    codes, scales = quantize(w, weight_format, 32)
    if weight_format == "int4":
        return codes, scales.bfloat16()
    if weight_format == "mxfp4":  # Exponents of two as the bits of bfloat16.
        return codes, (scales.int() << 7).short().view(torch.bfloat16)
    return codes, scales
