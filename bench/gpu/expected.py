"""Expected time of an expert block on an H100, by arithmetic; no GPU is needed.

    python -m bench.gpu.expected              shares of the floor, before and now
    python -m bench.gpu.expected --kernels    the same, kernel by kernel

The floor is that of the benchmark (work.py): operations at the rate of cuBLAS or bytes at the rate
of a copy, whichever takes longer. The expected time uses the kernels with the tiles that
csrc/cuda/grouped_gemm/choose.h and csrc/cuda/moe_ffn/choose.h select (`moe_ops_dev`), simulated
tile by tile in the schedulers' order. Assumptions, none of them measured with these kernels:

- A stage (64 of the reduction) of a tile takes as long as the slowest of: its MMAs, at MAINLOOP of
the rate of cuBLAS; its bytes from L2, at L2_READ per cycle and SM, above L2's rate since
simultaneous requests of blocks for one line are served once; the producer warps' instructions for
gathered rows, and the wait for an index that is read in the stage that needs it. Rows gathered by
cp.async cost GATHER of the rate.
- Ping-pong hides the shorter of a tile's MMAs and epilogue. A cooperative tile exposes its
epilogue: instructions, as counted in the binary, and its stores (at L2_WRITE). Stores through
shared memory overlap the next tile, and the two warpgroups are half a stage apart, which hides that
much of the instructions.
- The first stages of a tile are loaded when its MMAs begin, except for the first tile of a block.
- Blocks take tiles b, b + grid, ...; a kernel ends with its last block. The next one starts
LAUNCH_S later, and all operands pass DRAM once per band of row tiles.
- Kernels reach STREAM of the rate of a copy.

MAINLOOP is the only fitted value: it was fitted to another measurement of these kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bench.gpu.cases import MODELS, Case, make_ids
from bench.gpu.planner import Rates
from bench.gpu.work import work_of
from bench.harness.dev import moe_ops_dev
from moe_ops.bench.shapes import Shape

SMS, CLOCK = 132, 1.755e9
RATES = Rates(flops=798e12, bytes=3.0e12)
L2_BYTES = 30e6  # of 50 MB: the part available to a matrix that is read repeatedly
LAUNCH_S, SORT_S = 2e-6, 8e-6
# Fractions of RATES.flops, of MAINLOOP's rate, and of RATES.bytes.
MAINLOOP, GATHER, STREAM = 0.86, 0.97, 0.9
# Bytes per cycle and SM.
L2_READ, L2_WRITE = 39.0, 26.0
# Cycles: an index from L2 and its division; a copy of 16 bytes per thread; the first stage of a
# block; the last MMAs and the first store of a tile.
INDEX, COPY, FILL, DRAIN = 750.0, 25.0, 1500.0, 1000.0
# Instructions per accumulator: a store from registers and through shared memory, SwiGLU with the
# store of h in either way (csrc/cuda/moe_ffn/NOTES.md), an activation's backward.
STORE, BOX_STORE, SWIGLU, BOX_SWIGLU, ACTIVATE_BWD = 3.3, 2.0, 10.7, 4.1, 50.0
STAGE, ELEMENT = 64, 2

MODEL_NAMES = ("mixtral-8x7b", "qwen3-30b", "deepseek-v3", "gpt-oss-120b")
TOKENS = (4096, 8192, 32768)
ROUTINGS = ("balanced", "random", "skewed")


@dataclass(frozen=True)
class Kernels:
    """Optimizations of the kernels; the first version had none of them."""

    # Cooperative tiles store through shared memory, with the warpgroups half a stage apart.
    store_boxes: bool = False
    # Row tiles share weights if an expert fills them; an expert's remaining rows form a tile that a
    # cluster's blocks split by columns.
    real_counts: bool = False
    # Weight gradients with a gathered operand: tiles of 128 x 256, indices prefetched two stages
    # ahead.
    wide_wgrad: bool = False
    # The backward down projection shares weights between two row tiles.
    paired_down_bwd: bool = False
    # Weight gradients process experts with the most rows first, in alternating directions.
    longest_first: bool = False


BEFORE = Kernels()
NOW = Kernels(**{field.name: True for field in fields(Kernels)})


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    cluster: int = 1
    pingpong: bool = True


# csrc/cuda/moe_ffn/config.h
UP_TILES = {
    "low": Tile(64, 256),
    "high": Tile(128, 256, 1, False),
    "pair": Tile(128, 256, 2, False),
}
DOWN_BWD_TILES = {"low": Tile(64, 128), "high": Tile(128, 128, 2)}


def parse_tile(text: str) -> Tile:
    """Parses `gemm_config`: "128x256x64 cooperative cluster 2"."""
    size, schedule, _, cluster = text.split()
    m, n, _ = size.split("x")
    return Tile(int(m), int(n), int(cluster), schedule == "ping-pong")


@dataclass(frozen=True)
class Expected:
    """Seconds of a kernel, and its minimum at the rate of cuBLAS."""

    name: str
    seconds: float
    floor_s: float


@dataclass(frozen=True)
class Operand:
    """One of a tile's two operands: 16-byte copies per thread of the producer and stage, if it is
    gathered."""

    lines: int  # elements of 64, per stage and block
    gathered: bool = False

    @property
    def copies(self) -> float:
        return self.lines * STAGE * ELEMENT / 16 / 128 if self.gathered else 0.0


def _stage_cycles(tile: Tile, a: Operand, b: Operand, index_s: float) -> float:
    """Returns the cycles of a stage (64 of the reduction); `index_s`: cycles that the producer
    waits in every stage."""
    gathered = a.gathered or b.gathered
    rate = RATES.flops / (2 * SMS * CLOCK) * MAINLOOP * (GATHER if gathered else 1.0)
    products = tile.m * tile.n * STAGE / rate
    load = (a.lines + b.lines) * STAGE * ELEMENT / L2_READ
    return max(products, load, (a.copies + b.copies) * COPY + (index_s if gathered else 0.0))


def _end_cycles(tile: Tile, instructions: float, stored: float, boxes: bool) -> float:
    """Returns the cycles of an epilogue: `instructions` per accumulator, `stored` bytes per
    accumulator, including reads. Eight warps on four schedulers finish a cooperative tile, four a
    ping-pong one."""
    issue = tile.m * tile.n / 32 / 4 * instructions
    if boxes:
        apart = tile.m * tile.n * STAGE / (RATES.flops / (2 * SMS * CLOCK)) / 2
        return max(issue - apart, 0.0) + DRAIN / 2
    stores = tile.m * tile.n * stored / L2_WRITE
    return max(issue, stores) + DRAIN


def _tile_cycles(tile: Tile, products: Tensor, end: float) -> Tensor:
    if tile.pingpong:
        return torch.maximum(products, (products + end) / 2)
    return products + end


def _last_block(cycles: Tensor, workers: int, snake: bool = False) -> float:
    """Returns the longest of `workers` lists, tile i in list i % workers; with `snake` every other
    round is dealt backwards."""
    rounds = -(-len(cycles) // workers)
    padded = torch.zeros(rounds * workers, dtype=torch.float64)
    padded[: len(cycles)] = cycles
    dealt = padded.view(rounds, workers)
    if snake:
        dealt[1::2] = dealt[1::2].flip(1)
    return float(dealt.sum(0).max())


def _seconds(cycles: float, dram: float) -> float:
    return max((cycles + FILL) / CLOCK, dram / (STREAM * RATES.bytes)) + LAUNCH_S


def _ceil(a: Tensor, b: int) -> Tensor:
    return torch.div(a + b - 1, b, rounding_mode="floor")


def row_tiles(counts: Tensor, tile: Tile, column_tiles: int, real_counts: bool) -> int:
    """Returns the cluster tiles needed for the experts' rows."""
    pair = tile.m * tile.cluster
    if not real_counts or tile.cluster == 1:
        return int(_ceil(counts, pair).sum()) * column_tiles
    left = counts % pair
    halves = int(((left > 0) & (left <= tile.m)).sum())
    full = int(_ceil(counts, pair).sum()) - halves
    return full * column_tiles + halves * -(-column_tiles // tile.cluster)


def ragged_m(
    name: str,
    counts: Tensor,
    n: int,
    k: int,
    tile: Tile,
    kernels: Kernels,
    *,
    gathered: bool = False,
    instructions: float | None = None,
    moved: float = ELEMENT,
) -> Expected:
    """Models rows [N, k] times the [n, k] of their expert. The epilogue takes `instructions` per
    accumulator (those of a store if None) and moves `moved` bytes per accumulator."""
    N = int(counts.sum())
    used = int((counts > 0).sum())
    column_tiles = -(-n // tile.n)
    a, b = Operand(tile.m, gathered), Operand(tile.n // tile.cluster)
    stages = -(-k // STAGE)
    boxes = kernels.store_boxes and not tile.pingpong
    if instructions is None:
        instructions = BOX_STORE if boxes else STORE
    end = _end_cycles(tile, instructions, moved, boxes)
    cycles = _tile_cycles(tile, torch.tensor(stages * _stage_cycles(tile, a, b, 0.0)), end)
    tiles = row_tiles(counts, tile, column_tiles, kernels.real_counts)
    rounds = -(-tiles // (SMS // tile.cluster))
    matrix = n * k * ELEMENT
    bands = used if matrix < L2_BYTES else int(_ceil(counts, 16 * tile.m).sum())
    dram = bands * matrix + N * k * ELEMENT + N * n * moved
    return Expected(name, _seconds(rounds * float(cycles), dram), 2.0 * N * n * k / RATES.flops)


def ragged_k(
    name: str, counts: Tensor, m: int, n: int, tile: Tile, kernels: Kernels, gathers: str
) -> Expected:
    """Models rows [N, m]^T times rows [N, n], expert by expert; `gathers`: "a" or "b"."""
    N = int(counts.sum())
    a, b = Operand(tile.m, gathers == "a"), Operand(tile.n // tile.cluster, gathers == "b")
    index_s = 0.0 if kernels.wide_wgrad else INDEX
    boxes = kernels.store_boxes and not tile.pingpong
    end = _end_cycles(tile, BOX_STORE if boxes else STORE, ELEMENT, boxes)
    if kernels.longest_first:
        counts = counts.sort(descending=True).values
    products = _ceil(counts, STAGE).double() * _stage_cycles(tile, a, b, index_s)
    tiles = row_tiles(torch.tensor([m]), tile, -(-n // tile.n), kernels.real_counts)
    cycles = _tile_cycles(tile, products, end).repeat_interleave(tiles)
    last = _last_block(cycles, SMS // tile.cluster, kernels.longest_first)
    dram = ELEMENT * (N * (m + n) + len(counts) * m * n)
    return Expected(name, _seconds(last, dram), 2.0 * N * m * n / RATES.flops)


def wgrad(name: str, counts: Tensor, m: int, n: int, product: str, kernels: Kernels) -> Expected:
    """Models a weight gradient; `product`: "gather_tn" or "tn_gather"."""
    tile = Tile(128, 128)
    if kernels.wide_wgrad:
        tile = parse_tile(
            moe_ops_dev.gemm_config(product, int(counts.sum()), len(counts), m, n, 0, SMS)
        )
    return ragged_k(name, counts, m, n, tile, kernels, "a" if product == "gather_tn" else "b")


def moved_rows(name: str, bytes_: float) -> Expected:
    return Expected(name, bytes_ / (STREAM * RATES.bytes) + LAUNCH_S, 0.0)


def forward(shape: Shape, counts: Tensor, T: int, kernels: Kernels, train: bool) -> list[Expected]:
    H, I, E = shape.H, shape.I, shape.E
    N = int(counts.sum())
    up = UP_TILES[moe_ops_dev.ffn_config("up", N, E, 2 * I, H, SMS)]
    down = parse_tile(moe_ops_dev.gemm_config("nt", N, E, 0, H, I, SMS))
    # Two accumulators give one h; training also stores both.
    moved = ELEMENT / 2 + (ELEMENT if train else 0)
    swiglu, store = (BOX_SWIGLU, BOX_STORE) if kernels.store_boxes else (SWIGLU, STORE)
    instructions = swiglu + (store if train else 0.0)
    return [
        Expected("sort", SORT_S, 0.0),
        ragged_m(
            "up",
            counts,
            2 * I,
            H,
            up,
            kernels,
            gathered=True,
            instructions=instructions,
            moved=moved,
        ),
        ragged_m("down", counts, H, I, down, kernels),
        moved_rows("combine", ELEMENT * H * (N + T)),
    ]


def training(shape: Shape, counts: Tensor, T: int, kernels: Kernels) -> list[Expected]:
    H, I, E = shape.H, shape.I, shape.E
    N = int(counts.sum())
    down_bwd = DOWN_BWD_TILES[moe_ops_dev.ffn_config("down_bwd", N, E, I, H, SMS)]
    if not kernels.paired_down_bwd:
        down_bwd = replace(down_bwd, cluster=1)
    dgrad = parse_tile(moe_ops_dev.gemm_config("nn", N, E, 0, H, 2 * I, SMS))
    return [
        *forward(shape, counts, T, kernels, True),
        ragged_m(
            "down_bwd",
            counts,
            I,
            H,
            down_bwd,
            kernels,
            gathered=True,
            instructions=ACTIVATE_BWD,
            # Gate and up are read, their gradients and h written.
            moved=5 * ELEMENT,
        ),
        moved_rows("router_grad", 4.0 * N * -(-I // 128)),
        wgrad("wgrad_down", counts, H, I, "gather_tn", kernels),
        wgrad("wgrad_up", counts, 2 * I, H, "tn_gather", kernels),
        ragged_m("dgrad", counts, H, 2 * I, dgrad, kernels),
        moved_rows("combine_bwd", ELEMENT * H * (N + T)),
    ]


def rows_of_experts(shape: Shape, T: int, routing: str) -> Tensor:
    return torch.bincount(make_ids(shape, T, routing).flatten().long(), minlength=shape.E)


@dataclass(frozen=True)
class Layer:
    """A block's kernels and the floor of the whole."""

    kernels: list[Expected]
    floor_s: float

    @property
    def share(self) -> float:
        return self.floor_s / sum(kernel.seconds for kernel in self.kernels)


def expect(
    part: str, shape: Shape, T: int, routing: str, counts: Tensor, kernels: Kernels
) -> Layer:
    """Returns the expected time; `part`: "forward" or "training"."""
    case = Case(part, shape, T, routing)
    floor_s = RATES.floor_s(work_of(case, int((counts > 0).sum())))
    if part == "forward":
        return Layer(forward(shape, counts, T, kernels, False), floor_s)
    return Layer(training(shape, counts, T, kernels), floor_s)


def print_shares(versions: Sequence[tuple[str, Kernels]], routings: Sequence[str]) -> None:
    print(f"{'share of the floor':34}" + "".join(f"{name:>12}" for name, _ in versions))
    for name in MODEL_NAMES:
        for T in TOKENS:
            for routing in routings:
                counts = rows_of_experts(MODELS[name], T, routing)
                for part in ("forward", "training"):
                    shares = [
                        expect(part, MODELS[name], T, routing, counts, kernels).share
                        for _, kernels in versions
                    ]
                    print(
                        f"{name:13}{T:6} {routing:9}{part:9}"
                        + "".join(f"{share:12.2f}" for share in shares)
                    )


def print_kernels(versions: Sequence[tuple[str, Kernels]], routings: Sequence[str]) -> None:
    for name in MODEL_NAMES:
        for T in TOKENS:
            for routing in routings:
                counts = rows_of_experts(MODELS[name], T, routing)
                layers = [
                    expect("training", MODELS[name], T, routing, counts, kernels)
                    for _, kernels in versions
                ]
                print(f"{name} T={T} {routing}: us and share of its products at cuBLAS' rate")
                for row in zip(*(layer.kernels for layer in layers), strict=True):
                    cells = (f"{k.seconds * 1e6:12.0f} {k.floor_s / k.seconds:5.2f}" for k in row)
                    print(f"  {row[0].name:12}" + "".join(cells))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="each kernel of training")
    parser.add_argument("--routing", choices=ROUTINGS, nargs="*", default=["balanced", "random"])
    options = parser.parse_args(arguments)
    versions = [("before", BEFORE), ("now", NOW)]
    show: Callable[..., None] = print_kernels if options.kernels else print_shares
    show(versions, options.routing)


if __name__ == "__main__":
    main()
