"""Weight gradients of moe_ffn on the kernels for sm_90a, one side gathered: grad_y by token times
rows for w_down, rows times x by token for w_gate_up. Mutants are in moe_ffn_mutants.py."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import check_moe_ffn, ffn_operands
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.testing import assert_close_by_norm, short

TILES = {"128x128": (128, 128, 1), "128x256": (128, 256, 2)}
tiles = pytest.mark.parametrize("tile", TILES)

# Rows of experts around a stage and several of them, longer than the ring, none.
COUNTS = {
    "edges": (0, 1, 63, 64, 0, 65, 127, 128, 129, 0),
    "long": (255, 0, 257, 3),
    "skewed": (0, 400, *[1] * 9),
    "none": (0, 0),
}


@pytest.fixture(autouse=True)
def set_tile(request, monkeypatch):
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", request.getfixturevalue("tile"))


def operands(counts, hidden_size, intermediate_size, dtype=torch.bfloat16, dropped=4):
    """A call with two slots per token, so many of them for each expert; some slots have none."""
    ids = [e for e, rows in enumerate(counts) for _ in range(rows)]
    ids += [-1] * (dropped + len(ids) % 2)
    ids = torch.tensor(ids, dtype=torch.int32)[torch.randperm(len(ids))].view(-1, 2)
    routing = Routing(len(ids), len(counts), 2)
    return {**ffn_operands(routing, hidden_size, intermediate_size, dtype), "topk_ids": ids}


def saved_for_backward(call):
    names = ("x", "w_gate_up", "w_down", "topk_weights")
    _, *saved = torch.ops.moe_ops.moe_ffn_fwd(
        *(call[n] for n in names), call["topk_ids"], None, None, "swiglu", False, False
    )
    grad_y = torch.randn_like(call["x"])
    return grad_y, *(call[n] for n in names), *saved, None, "swiglu", False, False, 1.702, 7.0


def backward(arguments, *, gate_up, down):
    """The gradients of the two weights, of which each may be left out."""
    return torch.ops.moe_ops.moe_ffn_bwd(*arguments, False, gate_up, down, True, False, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("counts", COUNTS)
@tiles
def test_values(simulator, tile, counts, dtype):
    """One row tile of 128, two, and three, of which a cluster takes two and then one."""
    for hidden_size, intermediate_size in ((136, 72), (264, 136), (8, 8)):
        call = operands(COUNTS[counts], hidden_size, intermediate_size, dtype)
        check_moe_ffn(call, ["w_gate_up", "w_down"])
    assert simulator.warnings() == ""


@tiles
def test_an_odd_number_of_columns(simulator, tile):
    """A row tile without a partner and three column tiles: a block finds no column at the end."""
    check_moe_ffn(operands((70, 0, 3), 72, 520), ["w_down"])
    check_moe_ffn(operands((70, 0, 3), 520, 40), ["w_gate_up"])


@tiles
def test_schedules(simulator, tile):
    """Three or more tiles a block, a row tile without a partner, sums longer than the ring."""
    call = operands((290, 0, 3, 65), 264, 136)
    arguments = saved_for_backward(call)
    with simulator.options(sms=4):
        simulator.check_schedules(lambda: backward(arguments, gate_up=True, down=True))


@tiles
def test_bytes(simulator, tile):
    """TMA loads the side that is not gathered, once per tile of the other; kernels store each
    gradient once, and what the stage before writes for it."""
    m, n, cluster = TILES[tile]
    counts, H, I = (129, 0, 3, 320, 70), 264, 136
    arguments = saved_for_backward(operands(counts, H, I))
    names = ("tma_ld_bytes", "tma_st_bytes", "st_bytes")
    rows, stages = sum(counts), sum(-(-c // 64) for c in counts)

    def added(**wanted):
        """Returns what the gradient of a weight adds to that of the routing weights."""
        none = simulator.counted(lambda: backward(arguments, gate_up=False, down=False), *names)
        some = simulator.counted(lambda: backward(arguments, **wanted), *names)
        return {name: some[name] - none[name] for name in names}

    def stored(out_features, in_features, others):
        """The large tile stores boxes of 16 rows x 64 columns by TMA."""
        boxes = len(counts) * -(-out_features // 16) * -(-in_features // 64) * 2048
        elements = len(counts) * out_features * in_features * 2
        by_tma = boxes if tile == "128x256" else 0
        return {"tma_st_bytes": by_tma, "st_bytes": others + (0 if by_tma else elements)}

    together, single = divmod(-(-H // m), cluster)
    columns = -(-I // n)
    tiles = together * columns + single * -(-columns // cluster) * cluster
    assert added(gate_up=False, down=True) == {
        "tma_ld_bytes": stages * tiles * n * 64 * 2,
        **stored(H, I, rows * I * 2),
    }
    # Gathered columns are not shared: blocks of their own.
    tiles = -(-2 * I // m) * -(-H // n)
    assert added(gate_up=True, down=False) == {
        "tma_ld_bytes": stages * tiles * m * 64 * 2,
        **stored(2 * I, H, rows * 2 * I * 2),
    }


@pytest.mark.parametrize("experts", [512, 513])
@tiles
def test_many_experts(simulator, tile, experts):
    """Up to 512 are taken by their rows, more as they come."""
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[[1, 400, experts - 1]] = torch.tensor([3, 70, 66])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    grad, a = (torch.randn(int(offsets[-1]), 8).bfloat16() for _ in range(2))
    got = moe_ops.grouped_gemm_wgrad(grad, a, offsets)
    wanted = torch.zeros(experts, 8, 8, dtype=torch.float64)
    size = wanted.clone()
    for e in (1, 400, experts - 1):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        wanted[e] = grad[own].double().T @ a[own].double()
        size[e] = grad[own].double().abs().T @ a[own].double().abs()
    assert_close_by_norm(got, wanted, size, sum_length=70)
