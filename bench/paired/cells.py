"""The cells of `bench.paired`, run as a script by the interpreter of one build.

It prints where moe_ops was imported from, then reads cell names and answers each with its
nanoseconds, one line of JSON each. It uses only names that are public in every build, and imports
no benchmark code: a build may be older than the benchmarks.

Every cell runs in a process forked from one that has imported everything and has only created
weights. In one process for all, a cell would find the heap, scratch and huge pages left by earlier
cells, which differ between builds; small cells then vary by several percent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import layers, zoo

Job = Callable[[], object]
# H, I, E, K; the first three are those of moe_ops.bench.shapes.
SHAPES = {
    "a32": (2048, 768, 32, 8),
    "c": (2048, 1024, 64, 8),
    "d": (256, 512, 16, 2),
    "small": (512, 256, 32, 4),
    "narrow": (64, 32, 4, 2),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLE_S = 2e-3  # Shorter jobs are repeated within a sample.
CELL_S = 0.25
LEAST_SAMPLES = 5


@functools.lru_cache(maxsize=1)
def experts(shape: str, dtype: str) -> Any:
    """Returns the experts of a layer, with weights stored as in layers."""
    H, I, E, _ = SHAPES[shape]
    torch.manual_seed(0)
    module = layers.Experts(E, H, I).to(DTYPES[dtype])
    with torch.no_grad():
        module.w_gate_up.normal_(std=H**-0.5)
        module.w_down.normal_(std=I**-0.5)
    return module


def tokens(shape: str, dtype: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, routing weights and ids."""
    H, _, E, K = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, H, generator=generator).to(DTYPES[dtype])
    ids = torch.rand(count, E, generator=generator).topk(K).indices.int()
    return x, torch.rand(count, K, generator=generator), ids


def forward(shape: str, dtype: str, count: int) -> Job:
    module, (x, weights, ids) = experts(shape, dtype), tokens(shape, dtype, count)
    return lambda: moe_ops.moe_ffn(x, module.w_gate_up, module.w_down, weights, ids)


def packed(shape: str, dtype: str, count: int) -> Job:
    module, (x, weights, ids) = experts(shape, dtype), tokens(shape, dtype, count)
    copies = (
        moe_ops.pack_experts(module.w_gate_up, halves=True),
        moe_ops.pack_experts(module.w_down),
    )
    return lambda: moe_ops.moe_ffn_packed(x, module.w_gate_up, module.w_down, *copies, weights, ids)


def training(shape: str, dtype: str, count: int) -> Job:
    module, (x, weights, ids) = experts(shape, dtype), tokens(shape, dtype, count)
    leaves = [x.requires_grad_(), weights.requires_grad_(), module.w_gate_up, module.w_down]

    def step() -> None:
        y = moe_ops.moe_ffn(x, module.w_gate_up, module.w_down, weights, ids)
        torch.autograd.grad(y.sum(), leaves)

    return step


def quantized(shape: str, dtype: str, count: int, format: str) -> Job:
    module, (x, weights, ids) = experts(shape, dtype), tokens(shape, dtype, count)
    if hasattr(moe_ops, "quantize"):
        configs = {"int8": "Int8WeightConfig", "int4": "Int4WeightConfig"}
        integers = moe_ops.quantize(module, getattr(moe_ops, configs[format])())
    else:  # An older build.
        integers = moe_ops.quantize_experts(module, format)
    return lambda: integers(x, weights, ids)


def router(count: int, num_experts: int, top_k: int) -> Job:
    logits = torch.randn(count, num_experts)
    return lambda: moe_ops.topk_router(logits, top_k)


def attention(kind: str, head_size: int, grad: bool) -> Job:
    q = torch.randn(1, 256, 2, 4, head_size)
    k, v = torch.randn(1, 256, 4, head_size), torch.randn(1, 256, 4, head_size)
    if not grad:
        return lambda: moe_ops.moa_attention(q, k, v, kind=kind)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def step() -> None:
        out = moe_ops.moa_attention(*leaves, kind=kind)
        torch.autograd.grad((out if isinstance(out, Tensor) else out[0]).sum(), leaves)

    return step


def layer_training() -> Job:
    layer = layers.MoE(layers.TopKRouter(64, 4, 2), layers.Experts(4, 64, 128))
    x = torch.randn(64, 64)
    return lambda: layer(x).sum().backward()


def linear_map_training() -> Job:
    x = torch.randn(256, 64, requires_grad=True)
    w = torch.randn(8, 64, 64, requires_grad=True)
    ids = torch.rand(256, 8).topk(2).indices.int()
    return lambda: torch.autograd.grad(moe_ops.moe_linear_map(x, w, ids).sum(), [x, w])


def gated_act() -> Job:
    x = torch.randn(64, 512)
    return lambda: moe_ops.gated_act(x)


def add_rms_norm() -> Job:
    x, weight = torch.randn(64, 512), torch.randn(512)
    return lambda: moe_ops.add_rms_norm(x, weight, x)


def permute() -> Job:
    x, ids, weights = torch.randn(512, 256), torch.randint(8, (512, 2)).int(), torch.ones(512, 2)

    def there_and_back() -> Tensor:
        offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, 8)
        rows = moe_ops.permute(x, offsets, row_to_slot)
        return moe_ops.unpermute(rows, offsets, slot_to_row, weights)

    return there_and_back


def model_training(system: str) -> Job:
    model = zoo.create_model(system, preset="tiny")
    text = torch.randint(model.config.vocab_size, (2, 65))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(text).loss.backward()

    return step


def all_cells() -> dict[str, Callable[[], Job]]:
    """Returns functions that prepare the jobs, by name. Cells of one shape are consecutive and
    share weights."""
    cells: dict[str, Callable[[], Job]] = {}

    def add(name: str, make: Callable[..., Job], *arguments: Any) -> None:
        cells[name] = functools.partial(make, *arguments)

    for dtype in DTYPES:
        for shape, counts, training_counts in (
            ("small", (1, 4, 16, 64, 512), (16, 64, 512)),
            ("narrow", (64, 512), (64, 512)),
            ("d", (1, 16, 64, 512), (16, 512)),
            ("a32", (1, 16, 64), (64,)),
            ("c", (1, 16), ()),
        ):
            for T in counts:
                add(f"forward {shape} {dtype} T{T}", forward, shape, dtype, T)
                if shape != "narrow":
                    add(f"packed {shape} {dtype} T{T}", packed, shape, dtype, T)
            for format in ("int8", "int4") if shape in ("small", "d") else ():
                for T in (1, 16, 64):
                    add(f"{format} {shape} {dtype} T{T}", quantized, shape, dtype, T, format)
            for T in training_counts:
                add(f"training {shape} {dtype} T{T}", training, shape, dtype, T)
    for T, E, K in ((1, 8, 2), (64, 8, 2), (64, 128, 8), (512, 128, 8)):
        add(f"router T{T} E{E}", router, T, E, K)
    for head_size in (16, 64):
        for kind in ("softmax", "stick_breaking"):
            add(f"attention {kind} d{head_size}", attention, kind, head_size, False)
            add(f"attention training {kind} d{head_size}", attention, kind, head_size, True)
    add("layer training T64", layer_training)
    add("linear_map training T256", linear_map_training)
    add("gated_act", gated_act)
    add("add_rms_norm", add_rms_norm)
    add("permute", permute)
    for system in ("jetmoe", "deepseek", "moduleformer"):
        add(f"model training {system}", model_training, system)
    return cells


def nanoseconds(job: Job) -> float:
    """Returns nanoseconds of this thread's CPU time, which excludes other processes: a fifth of the
    samples are faster."""
    for _ in range(3):
        job()
    started = time.perf_counter()
    job()
    repeats = max(1, int(SAMPLE_S / max(1e-6, time.perf_counter() - started)))
    samples: list[float] = []
    end = time.perf_counter() + CELL_S
    while time.perf_counter() < end or len(samples) < LEAST_SAMPLES:
        before = time.thread_time_ns()
        for _ in range(repeats):
            job()
        samples.append((time.thread_time_ns() - before) / repeats)
    return sorted(samples)[len(samples) // 5]


def chosen(words: list[str]) -> list[str]:
    """Returns the cells whose names contain one of these words; all without words."""
    return [name for name in all_cells() if not words or any(word in name for word in words)]


def measure(name: str) -> float | str:
    """Returns nanoseconds of a cell, or the reason why it cannot run; in its own process."""
    prepare = all_cells()[name]
    assert isinstance(prepare, functools.partial)
    read, write = os.pipe()
    if prepare.func in (forward, packed, training, quantized):
        experts(*prepare.args[:2])  # Shared, to avoid drawing their values for each cell.
    child = os.fork()
    if child == 0:
        result: float | str
        try:
            torch.manual_seed(0)
            with contextlib.nullcontext() if "training" in name else torch.no_grad():
                result = nanoseconds(prepare())
        except Exception as problem:  # A build may lack a function that the cell calls.
            result = f"{type(problem).__name__}: {problem}".splitlines()[0]
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if text else f"ended with {status}"


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(moe_ops.__file__), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    main()
