"""Tests of the exact number of bytes that moe_ffn's own kernels for sm_90a move.
csrc/cuda/moe_ffn/NOTES.md has the formula; letters as there: r rows of an expert, Ct column tiles,
S steps of 64 of the sum.

The simulator counts bytes before any cache: TMA by whole boxes, loads and stores lane by lane."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import ffn_operands, stored
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import reference

SMS = 3  # a few tiles a block
# csrc/cuda/moe_ffn/config.h: rows and columns of a tile, row tiles that share weights.
UP_TILES = {"low": (64, 256, 1), "high": (128, 256, 1), "pair": (128, 256, 2)}
DOWN_BWD_TILES = {"low": (64, 128, 1), "high": (128, 128, 2)}
ACTIVATIONS = {
    "halves": {"activation": "swiglu", "interleaved": False},
    "interleaved": {"activation": "swiglu_oai", "interleaved": True},
    "plain": {"activation": "relu2", "interleaved": False},
}
COUNTERS = ("ld_bytes", "st_bytes", "tma_ld_bytes", "tma_st_bytes")
WARP = 32
LANES = 4 * WARP  # bytes of a load of four that a whole warp makes
TENSOR_MAP = 128

layouts = pytest.mark.parametrize("layout", ACTIVATIONS)
# Stored: as gpt-oss and Llama 4 have their weights, dense along the output features.
storages = pytest.mark.parametrize("names", [(), ("w_gate_up", "w_down")], ids=["", "stored"])


@pytest.fixture(autouse=True)
def few_blocks(simulator, monkeypatch):
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "128x128")
    with simulator.options(sms=SMS):
        yield


def ceil(a, b):
    return -(-a // b)


class Case:
    """A call and its sizes. Experts of 0, 1 and 2 row tiles, 17 slots without an expert; more
    experts than a lane of the scheduler holds."""

    def __init__(self, layout, hidden_size, intermediate_size, names=(), **kwargs):
        counts = (3, 70, 0, 170, 1, 0, 64)
        ids = torch.tensor([e for e, r in enumerate(counts) for _ in range(r)] + [-1] * 17)
        ids = ids[torch.randperm(len(ids))].to(torch.int32)[:, None]
        routing = Routing(len(ids), len(counts), 1)
        options = ACTIVATIONS[layout]
        self.call = ffn_operands(
            routing,
            hidden_size,
            intermediate_size,
            torch.bfloat16,
            activation=options["activation"],
        )
        self.call |= {"topk_ids": ids, "interleaved": options["interleaved"], **kwargs}
        self.call = stored(self.call, names)
        self.counts, self.num_slots = counts, len(ids)
        self.rows, self.experts = sum(counts), len(counts)
        self.H, self.I = hidden_size, intermediate_size
        self.P = self.call["w_gate_up"].shape[1]


def cluster_tiles(rows, columns, tile):
    """Tiles of a cluster for the rows of an expert: (those that share B, those whose blocks have
    other columns of a row tile without a partner)."""
    m, _, cluster = tile
    together, single = divmod(ceil(rows, m), cluster)
    return together * columns, single * ceil(columns, cluster)


def gemm_tma_bytes(counts, n, k, tile, box_m=None):
    """Returns the bytes that a row tile and a column tile load: B once a cluster that shares it, A
    in boxes unless it is gathered."""
    _, n_tile, cluster = tile
    steps, columns = ceil(k, 64), ceil(n, n_tile)
    tiles = [cluster_tiles(r, columns, tile) for r in counts]
    b = sum(shared + cluster * own for shared, own in tiles) * steps * n_tile * 64 * 2
    a = 0
    if box_m is not None:
        a = sum(ceil(r, box_m) for r in counts) * box_m * columns * steps * 64 * 2
    return a + b


def box_bytes(counts, columns):
    """Returns the bytes that are stored through boxes of 16 rows of an expert and 64 columns."""
    return sum(ceil(r, 16) for r in counts) * ceil(columns, 64) * 16 * 128


# Warps of a block that walk the list of tiles, and tensor maps: two consumer warpgroups, and four
# warps of a producer that gathers A, or one that loads A and B by TMA.
GATHER = (12, 1)
UP = (12, 2)  # and the one of h
TMA = (9, 2)


def overhead_bytes(case, columns, tile, producer):
    """A block fetches its tensor maps; its warps read expert_offsets: each scans all experts once,
    five entries for each four of a lane, and reads the expert of each tile again, from the lane's
    first entry to the end of the expert, by all lanes at once."""
    m, _, cluster = tile
    assert case.experts < 4 * WARP, "one scan"
    scan = case.experts + 1 + case.experts // 4
    of_expert = [sum(cluster_tiles(r, columns, tile)) for r in case.counts]
    most = case.num_slots // (m * cluster) + min(case.experts + 1, case.num_slots)
    clusters = min(max(1, SMS // cluster), most * columns)
    tiles = sum(t * (e % 4 + 2) for e, t in enumerate(of_expert))
    warps, maps = producer
    walked = cluster * warps * (4 * scan * clusters + LANES * tiles)
    return walked + cluster * clusters * maps * TENSOR_MAP


def gathered_bytes(case, features, columns):
    """Rows that exist, once per column tile; each of the 8 threads of a row reads its index."""
    return case.rows * columns * (2 * features + 8 * 4)


def sort_bytes(case):
    """(read, written); csrc/cuda/NOTES.md."""
    return 2 * 4 * case.num_slots, 4 * (2 * case.num_slots + case.experts + 1)


def combine_bytes(case, weighted):
    """(read, written) where rows are no longer than 1024 bytes; csrc/cuda/NOTES.md."""
    assert 2 * case.H <= 1024
    read = case.rows * (2 * case.H + 4 * weighted) + 4 * case.num_slots
    return read + 4 * case.num_slots, 2 * case.H * case.num_slots


@storages
@layouts
@pytest.mark.parametrize("tile", UP_TILES)
def test_forward(simulator, monkeypatch, tile, layout, names):
    """Weights once per row tile, x once per column tile, h and the rows of the result once, h in
    boxes; no copy of x by rows."""
    monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)
    case = Case(layout, 136, 264, names)
    counted = simulator.counted(lambda: moe_ops.moe_ffn(**case.call), *COUNTERS)
    shape, down = UP_TILES[tile], (128, 128, 1)
    # A tile of halves is as many columns of each as a half of it has.
    up_columns, down_columns = ceil(case.P, shape[1]), ceil(case.H, 128)
    if layout == "halves":
        up_columns = ceil(case.I, shape[1] // 2)
    sort, combine = sort_bytes(case), combine_bytes(case, True)
    assert counted == {
        "tma_ld_bytes": gemm_tma_bytes(case.counts, up_columns * shape[1], case.H, shape)
        + gemm_tma_bytes(case.counts, case.H, case.I, down, box_m=64),
        "tma_st_bytes": box_bytes(case.counts, case.I),
        "ld_bytes": sort[0]
        + gathered_bytes(case, case.H, up_columns)
        + overhead_bytes(case, up_columns, shape, UP)
        + overhead_bytes(case, down_columns, down, TMA)
        + combine[0],
        "st_bytes": sort[1] + case.rows * 2 * case.H + combine[1],
    }


@layouts
@pytest.mark.parametrize("tile", UP_TILES)
def test_preactivation(simulator, monkeypatch, tile, layout):
    """Training also stores the pre-activation, in boxes: of halves each half, rows of no expert as
    zeros."""
    monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)
    case = Case(layout, 136, 264, apply_router_weight_on_input=False)
    counted = simulator.counted(lambda: saved_for_backward(case), *COUNTERS)
    groups = (*case.counts, case.num_slots - case.rows)
    preact = [case.I, case.I] if layout == "halves" else [case.P]
    boxed = sum(box_bytes(groups, columns) for columns in (case.I, *preact))
    assert counted["tma_st_bytes"] == boxed
    stored = sort_bytes(case)[1] + case.rows * 2 * case.H + combine_bytes(case, True)[1]
    assert counted["st_bytes"] == stored


def saved_for_backward(case):
    """The arguments of moe_ffn_bwd without the gradients that are wanted."""
    call = case.call
    names = ("x", "w_gate_up", "w_down", "topk_weights")
    options = (call["activation"], call["interleaved"], call["apply_router_weight_on_input"])
    _, *saved = torch.ops.moe_ops.moe_ffn_fwd(
        *(call[n] for n in names), call["topk_ids"], None, None, *options
    )
    grad_y = torch.randn_like(call["x"])
    return (grad_y, *(call[n] for n in names), *saved, None, *options, 1.702, 7.0)


@storages
@layouts
@pytest.mark.parametrize("tile", DOWN_BWD_TILES)
def test_backward_down_projection(simulator, monkeypatch, tile, layout, names):
    """The stage is alone where only the gradient of the routing weights is wanted: w_down once per
    row tile, grad_y once per column tile, the pre-activation once."""
    monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)
    case = Case(layout, 136, 264, names, apply_router_weight_on_input=False)
    arguments = saved_for_backward(case)
    wanted = (False, False, False, True, False, False)
    counted = simulator.counted(
        lambda: torch.ops.moe_ops.moe_ffn_bwd(*arguments, *wanted), *COUNTERS
    )
    shape, columns = DOWN_BWD_TILES[tile], ceil(case.I, 128)
    # Index and weight of a row, by the four threads that share it.
    weights = case.rows * columns * 4 * 8
    # Of each row in the second kernel, a warp's lanes read the slot and the end of the rows.
    router = case.num_slots * 2 * LANES
    assert counted == {
        "tma_ld_bytes": gemm_tma_bytes(case.counts, case.I, case.H, shape),
        "tma_st_bytes": 0,
        "ld_bytes": gathered_bytes(case, case.H, columns)
        + overhead_bytes(case, columns, shape, GATHER)
        + case.rows * 2 * case.P
        + weights
        + router
        + case.rows * 4 * columns,
        "st_bytes": case.rows * 4 * columns + 4 * case.num_slots,
    }


@storages
@layouts
@pytest.mark.parametrize(
    "on_input", [False, pytest.param(True, marks=pytest.mark.full)], ids=["output", "input"]
)
@pytest.mark.parametrize("tile", DOWN_BWD_TILES)
def test_backward(simulator, monkeypatch, tile, on_input, layout, names):
    """All that TMA reads and all that is stored: every gradient once, the gradient of the
    pre-activation (with weights on the input also times the weight), weight * h, and the gradient
    of x by rows."""
    monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)
    case = Case(layout, 136, 264, names, apply_router_weight_on_input=on_input)
    H, I, P, E = case.H, case.I, case.P, case.experts
    arguments = saved_for_backward(case)
    counted = simulator.counted(
        lambda: torch.ops.moe_ops.moe_ffn_bwd(*arguments, *[True] * 6),
        *("st_bytes", "tma_ld_bytes", "tma_st_bytes"),
    )
    by_rows = 2 * (P * (1 + on_input) + I + H) + (0 if on_input else 4 * ceil(I, 128))
    gradients = 2 * E * (P * H + H * I + P + H) + 2 * H * case.num_slots + 4 * case.num_slots
    # Weight gradients: the operand that is not gathered, once per tile of 128 of the other one's.
    summed = sum(ceil(r, 64) for r in case.counts) * 64 * 128 * 2 * ceil(H, 128)
    assert counted == {
        "tma_ld_bytes": gemm_tma_bytes(case.counts, I, H, DOWN_BWD_TILES[tile])
        + summed * (ceil(I, 128) + ceil(P, 128))
        + gemm_tma_bytes(case.counts, H, P, (128, 128, 1), box_m=64),
        "tma_st_bytes": 0,
        "st_bytes": case.rows * by_rows + gradients,
    }


@storages
@layouts
def test_few_tokens(simulator, monkeypatch, layout, names):
    """Weights of the experts with rows, once. Nothing is launched to sort: every block of the first
    product reads all ids."""
    monkeypatch.delenv("MOE_OPS_GEMM_TILE")
    call = ffn_operands(
        Routing(9, 6, 2, "half_empty"),
        256,
        384,
        torch.bfloat16,
        activation=ACTIVATIONS[layout]["activation"],
    )
    call["interleaved"] = ACTIVATIONS[layout]["interleaved"]
    call = stored(call, names)
    counted = simulator.counted(lambda: moe_ops.moe_ffn(**call), *COUNTERS)
    offsets = reference.sort_by_expert(call["topk_ids"], 6)[0]
    counts = offsets.diff().tolist()
    rows, active = sum(counts), sum(count > 0 for count in counts)
    assert 0 < active <= 3
    weights = call["w_gate_up"][0].numel() + call["w_down"][0].numel()
    # A tile is 64 features with a gate, else 128, and each reads its rows again. Six experts and 18
    # slots: at most six tiles of rows.
    up_tiles, down_tiles = 384 // (128 if layout == "plain" else 64), 256 // 128
    gathered = rows * (up_tiles * 2 * 256 + down_tiles * 2 * 384)
    # Eight warps of a block of the second product look for their expert, five entries a lane; those
    # that have one read where its rows begin and end. Blocks with rows fetch two tensor maps.
    overhead = 8 * LANES * down_tiles * (6 * 5 + active * 2)
    overhead += active * (up_tiles + down_tiles) * 2 * TENSOR_MAP
    combine = rows * (2 * 256 + 4) + 4 * 18 + 4 * 9
    assert counted == {
        "tma_ld_bytes": 2 * active * weights,
        "tma_st_bytes": 0,
        "ld_bytes": 4 * 18 * 6 * up_tiles + gathered + overhead + combine,
        "st_bytes": 4 * (18 + 6 + 1) + rows * 2 * (384 + 256) + 2 * 256 * 9,
    }
