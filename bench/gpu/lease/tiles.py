"""Step tiles: GEMMs and blocks with every tile that can be forced, and with the library's
selection. The models of choose.h are fitted to these times.

There are twelve GEMMs, up and down projection and weight gradient of four layers, and the fused
block of each. `MOE_OPS_GEMM_TILE` and `MOE_OPS_FFN_TILE` force tiles; the library reads them in
every call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

import moe_ops
from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.clock import Clock, CudaClock, HostClock, Prepared
from bench.gpu.layer import Layer, Weights
from bench.gpu.lease.child import UNFINISHED, Task
from bench.gpu.lease.measure import FOUR
from bench.gpu.problem import relative, sampled
from bench.harness.files import rounded
from moe_ops.bench.measure import in_a_sentence

CHOSEN = "chosen"
GEMM, FFN = "MOE_OPS_GEMM_TILE", "MOE_OPS_FFN_TILE"
TILES = {GEMM: ("128x256", "128x128", "64x128", "64x64"), FFN: ("low", "high", "pair", "composed")}
_TOKENS = (4096, 32768, 64)
_ROUNDS = 5
# Two orders of one GEMM's fp32 sums, rounded to bf16.
_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Product:
    """GEMM with `m`, `n`, `k` as in GemmDesc of choose.h; rows are of all experts."""

    name: str
    setting: str
    rows: int
    m: int
    n: int
    k: int
    flops: float
    call: Callable[[], Tensor]


def products(layer: Layer) -> Iterator[Product]:
    H, I, N = layer.case.shape.H, layer.case.shape.I, layer.case.num_slots
    offsets, bank, tokens = layer.sorted[0], layer.bank, layer.tokens
    one = 2.0 * N * H * I
    up, down = (layer.rows_h, bank.w_gate_up, offsets), (layer.rows_i, bank.w_down, offsets)
    wgrad = (layer.rows_2i, layer.rows_h, offsets)
    block = (tokens.x, bank.w_gate_up, bank.w_down, tokens.topk_weights, tokens.topk_ids)
    gemm = moe_ops.grouped_gemm
    yield Product("up", GEMM, N, 0, 2 * I, H, 2 * one, lambda: gemm(*up))
    yield Product("down", GEMM, N, 0, H, I, one, lambda: gemm(*down))
    yield Product(
        *("wgrad", GEMM, N, 2 * I, H, 0, 2 * one),
        lambda: moe_ops.grouped_gemm_wgrad(*wgrad),
    )
    yield Product("moe_ffn", FFN, N, 0, 2 * I, H, 3 * one, lambda: moe_ops.moe_ffn(*block))


def run(task: Task) -> tuple[int, str]:
    end = time.perf_counter() + task.seconds
    clock: Clock = CudaClock() if task.device == "cuda" else HostClock()
    done = {(r["model"], r["T"], r["product"]) for r in task.journal.records("tile", task.step)}
    shapes = [cases.SMALL] if task.dry else [cases.MODELS[name] for name in FOUR]
    before = len(done)
    wrong: list[str] = []
    for T in (64,) if task.dry else _TOKENS:
        for shape in shapes:
            layer = Layer(
                Case("forward", shape, T, "random"), Weights(shape, clock.device), clock.device
            )
            for product in products(layer):
                key = (shape.name, T, product.name)
                if key in done:
                    continue
                if time.perf_counter() > end:
                    return UNFINISHED, f"{len(done)} products measured, others left out"
                us, skipped = _times(clock, product)
                task.journal.write(
                    *("tile", task.step),
                    **{"model": shape.name, "T": T, "product": product.name},
                    **{"rows": product.rows, "experts": shape.E, "flops": product.flops},
                    **{"m": product.m, "n": product.n, "k": product.k},
                    us=rounded(us),
                    skipped=skipped,
                )
                wrong += [f"{product.name} {shape.name} T={T} {t}" for t in skipped]
                done.add(key)
                print(f"{product.name} {shape.name} T={T}: {us} {skipped or ''}", flush=True)
                clock.release()
            del layer
    text = f"{len(done)} products measured" + (f", {before} of them before" if before else "")
    return (1 if wrong else 0), text + (f"; wrong: {', '.join(wrong)}" if wrong else "")


def _times(clock: Clock, product: Product) -> tuple[dict[str, float], dict[str, str]]:
    """Returns microseconds for each tile, and the reasons of failures."""
    prepared: dict[str, Prepared] = {}
    skipped: dict[str, str] = {}
    want: Tensor | None = None
    for tile in (CHOSEN, *TILES[product.setting]):
        job = forced(product, tile)
        try:
            out = job()
            rows = sampled(out.shape[0], out.device)
            if want is None:
                want = out[rows].clone()
            error = relative(out[rows], want)
            if not error <= _TOLERANCE:
                skipped[tile] = f"relative error {error:.1e}"
                continue
            del out
            prepared[tile] = clock.prepare(job)
        except Exception as problem:
            skipped[tile] = in_a_sentence(problem)
    samples = clock.rounds(prepared, _ROUNDS)
    return {tile: sample.median * 1e6 for tile, sample in samples.items()}, skipped


def forced(product: Product, tile: str) -> Callable[[], Tensor]:
    """Returns the call with the setting applied whenever it runs: now, or in a later round."""

    def job() -> Tensor:
        if tile != CHOSEN:
            os.environ[product.setting] = tile
        try:
            return product.call()
        finally:
            os.environ.pop(product.setting, None)

    return job


def table(records: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """Returns one row per GEMM: times, and the selected tile's time over the fastest."""
    names = list(dict.fromkeys(tile for r in records for tile in r["us"]))
    rows = []
    for r in records:
        us = r["us"]
        lost = us[CHOSEN] / min(us.values()) - 1 if CHOSEN in us else float("nan")
        rate = r["flops"] / min(us.values(), default=float("inf")) * 1e-6
        times = [f"{us[name]:.4g}" if name in us else "–" for name in names]
        row = [r["product"], r["model"], str(r["T"]), *times]
        rows.append([*row, f"{rate:.0f}", f"{lost:.1%}"])
    header = ["product", "model", "T", *names, "TFLOP/s of the best", "lost by the choice"]
    return "Tiles, microseconds", header, rows
