"""Breaks the PTX of moe_ffn's own sm_90a kernels (tests/helpers/ptx_mutants.py). Run by
test_moe_ffn_sm90.py."""

from __future__ import annotations

import re

import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.ptx_mutants import (
    EXPECT,
    LOAD_B,
    PASS,
    TRY_WAIT,
    Case,
    Mutation,
    added,
    main,
    sub,
    wait_before,
)
from tests.helpers.routing import Routing

import moe_ops

BOX = r"(cp\.async\.bulk\.tensor\.3d[^;]*?\{%r\d+, )(%r\d+)(, %r\d+\}[^;]*;)"
COPY = r"cp\.async\.cg\.shared\.global[^;]*;"
ARRIVE = r"cp\.async\.mbarrier\.arrive\.noinc(\.shared::cta\.b64) (\[%r\d+\]);"
MULTICAST = r"(cp\.async\.bulk\.tensor\.3d[^;]*?)\.multicast::cluster([^;]*?), %rs\d+(, %rd\d+;)"
# Two registers, unlike the change of a phase.
SWIZZLE = r"xor\.b32\s+(%r\d+), (?!\1)(%r\d+), (%r\d+);"


def no_exchange(distance: int, value: str = r"\2", followed_by: str = "") -> Mutation:
    """Lanes so far apart do not exchange: each keeps its own value, or gets another one."""

    def mutate(ptx: str) -> str:
        lanes = set(re.findall(rf"mov\.u32\s+(%r\d+), {distance};", ptx))
        shuffle = r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+), (%r\d+), %r\d+, %r\d+;"
        found = [m for m in re.finditer(shuffle + followed_by, ptx) if m[3] in lanes]
        if not found:
            raise LookupError(f"no exchange over {distance} lanes is in the kernel")
        for m in reversed(found):
            kept = m[0][m[0].index(";") + 1 :]
            ptx = ptx[: m.start()] + m.expand(rf"mov.b32 \1, {value};") + kept + ptx[m.end() :]
        return ptx

    return mutate


# name: (kernel, tile, mutation). Waits of a ping-pong kernel are turn, full, empty in the order of
# the text; of the others full, empty.
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    "up: gathered rows announced before they are there": (
        "up",
        "high",
        sub(ARRIVE, r"mbarrier.arrive\1 _, \2;"),
    ),
    "up: pieces not swizzled": ("up", "high", sub(SWIZZLE, r"mov.b32 \1, \2;")),
    "up: an eighth of the rows are slots, not tokens": (
        "up",
        "high",
        # The last eight divisions are those of a thread's rows.
        sub(r"div\.s32\s+(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", -8),
    ),
    "up: full wait dropped": ("up", "high", wait_before(r"wgmma\.fence")),
    "up: expected bytes 32 short": ("up", "high", sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "up: pairs of a quad do not exchange": ("up", "high", no_exchange(2)),
    "up: half of w_gate_up 8 rows further": (
        "up",
        "low",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "up: turn wait dropped": ("up", "low", sub(TRY_WAIT, PASS, 0)),
    "up: products not awaited at the end": (
        "up",
        "low",
        sub(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    ),
    "up: half of w_gate_up not multicast": ("up", "pair", sub(MULTICAST, r"\1\2\3")),
    "up: remote release dropped": (
        "up",
        "pair",
        sub(r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];", "", 0),
    ),
    "down_bwd: an eighth of grad_y not copied": ("down_bwd", "high", sub(COPY, "", 0)),
    "down_bwd: turn wait dropped": ("down_bwd", "high", sub(TRY_WAIT, PASS, 0)),
    "down_bwd: empty wait dropped": (
        "down_bwd",
        "high",
        wait_before(r"mbarrier\.arrive\.expect_tx"),
    ),
    "down_bwd: half of a quad left out of the router gradient": (
        "down_bwd",
        "high",
        no_exchange(2, "0", r"\s+mov\.b32\s+%f\d+, %r\d+;\s+add\.f32"),
    ),
    "down_bwd: neighbours of a quad do not exchange": ("down_bwd", "high", no_exchange(1)),
    "few: lanes do not exchange": ("few", "", no_exchange(4)),
    "few: second block of weights 8 rows further": (
        "few",
        "",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "few: empty wait dropped": ("few", "", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "few: first block of weights of the next expert": (
        "few",
        "",
        sub(LOAD_B, added(r"\2", 1) + r"\1q\3 }", 0),
    ),
}


def name_parts(kernel: str, tile: str) -> tuple[str, ...]:
    """Of the kernel's name: its template arguments, as csrc/cuda/moe_ffn numbers them. A module
    holds all kernels of a stage."""
    if kernel == "few":
        return ("sm90_few_rows_kernel", "Li32E")  # up to 32 tokens
    tiles = f"FfnTileE{('low', 'high', 'pair').index(tile)}E"
    return (tiles, "GateUpE0E") if kernel == "up" else (tiles,)


def make_case(kernel: str, tile: str) -> Case:
    """Sums longer than the ring; with two SMs at least three tiles a block."""
    routing = Routing(9 if kernel == "few" else 120, 3, 2, "dropped")
    call = ffn_operands(routing, 520, 136, torch.bfloat16, bias=True)
    case = backward_case(call) if kernel == "down_bwd" else forward_case(call)
    case.kernel = name_parts(kernel, tile)
    case.env = {"MOE_OPS_FFN_TILE": tile}
    return case


def forward_case(call: dict[str, torch.Tensor]) -> Case:
    experts = call["w_down"].shape[0]
    return Case(
        run=lambda: moe_ops.moe_ffn(**call),
        prepare=lambda: moe_ops.sort_slots(call["topk_ids"], experts),
        kernel=(),
    )


def backward_case(call: dict[str, torch.Tensor]) -> Case:
    """The gradients of w_down, of the routing weights and of b_gate_up; the forward that saves what
    they need comes before."""
    grad = torch.randn_like(call["x"])
    operands = [call[n] for n in ("x", "w_gate_up", "w_down", "topk_weights")]
    options = ("swiglu", False, False, 1.702, 7.0)
    wanted = (False, False, True, True, True, False)
    saved: list[torch.Tensor] = []

    def forward() -> None:
        saved[:] = torch.ops.moe_ops.moe_ffn_fwd(
            *operands, call["topk_ids"], call["b_gate_up"], call["b_down"]
        )[1:]

    return Case(
        run=lambda: torch.ops.moe_ops.moe_ffn_bwd(
            grad, *operands, *saved, call["b_down"], *options, *wanted
        ),
        prepare=forward,
        kernel=(),
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
