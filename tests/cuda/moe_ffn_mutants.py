"""Breaks the PTX of moe_ffn's own sm_90a kernels (tests/helpers/ptx_mutants.py). Run by
test_moe_ffn_sm90.py."""

from __future__ import annotations

import re

import torch
from tests.helpers.ffn import ffn_operands, stored
from tests.helpers.ptx_mutants import (
    EXPECT,
    LOAD_B,
    PASS,
    STORE,
    TRY_WAIT,
    Case,
    Mutation,
    added,
    boxes_read,
    main,
    sub,
    wait_before,
)
from tests.helpers.routing import Routing

import moe_ops

BOX = r"(cp\.async\.bulk\.tensor\.3d\.shared[^;]*?\{%r\d+, )(%r\d+)(, %r\d+\}[^;]*;)"
DENSE_SIDE = r"(cp\.async\.bulk\.tensor\.3d\.shared[^;]*?\{)(%r\d+)(, %r\d+, %r\d+\}[^;]*;)"
# The last two say how A and B lie: a kernel has one loop for each way that its weights may lie.
ALONG_K = r"(wgmma\.mma_async[^;]*?, 1, 1), 0, 0;"
A_ALONG_M = r"(wgmma\.mma_async[^;]*?, 1, 1), 1, 0;"
B_ALONG_N = r"(wgmma\.mma_async[^;]*?, 1, 1), 0, 1;"
COPY = r"cp\.async\.cg\.shared\.global[^;]*;"
BARRIER = r"bar\.sync\s+0;"
ARRIVE = r"cp\.async\.mbarrier\.arrive\.noinc(\.shared::cta\.b64) (\[%r\d+\]);"
MULTICAST = r"(cp\.async\.bulk\.tensor\.3d[^;]*?)\.multicast::cluster([^;]*?), %rs\d+(, %rd\d+;)"
# Of a slot by the slots of a token, one for each row of a thread.
DIVISION = r"mul\.hi\.u32\s+(%r\d+), (%r\d+), (%r\d+);"
# Two registers, unlike the change of a phase.
SWIZZLE = r"xor\.b32\s+(%r\d+), (?!\1)(%r\d+), (%r\d+);"


def no_exchange(
    distance: int | tuple[int, int], value: str = r"\2", followed_by: str = ""
) -> Mutation:
    """Lanes so far apart (the kernel may choose between two distances) do not exchange: each keeps
    its own value, or gets another one."""

    def mutate(ptx: str) -> str:
        made = rf"mov\.u32\s+(%r\d+), {distance};"
        if isinstance(distance, tuple):
            made = rf"selp\.b32\s+(%r\d+), {distance[0]}, {distance[1]}, %p\d+;"
        lanes = set(re.findall(made, ptx))
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
# the text; of the others full, empty. "stored" kernels are the same with weights as gpt-oss and
# Llama 4 store them, along their features: the loop and the boxes of an up kernel for these come
# first.
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
        sub(DIVISION, r"mov.b32 \1, \2;", 0),
    ),
    "up: full wait dropped": ("up", "high", wait_before(ALONG_K)),
    "up: expected bytes 32 short": ("up", "high", sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "up: boxes of h not awaited": ("up", "high", sub(boxes_read(0), "")),
    "up: h of the next expert's rows stored": (
        "up",
        "low",
        sub(STORE, added(r"\4", -1) + r"\1\2\3q\5\6\7 }"),
    ),
    "up, interleaved: lanes do not exchange columns of h": ("up_joint", "high", no_exchange(1)),
    "up: half of w_gate_up 8 rows further": (
        "up",
        "low",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", -1),
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
        sub(r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];", "", 3),
    ),
    "down_bwd: an eighth of grad_y not copied": ("down_bwd", "high", sub(COPY, "", 0)),
    "down_bwd: turn wait dropped": ("down_bwd", "high", sub(TRY_WAIT, PASS, 0)),
    # In the text: turn, the full waits of both loops, those of a warpgroup without rows, empty.
    "down_bwd: empty wait dropped": ("down_bwd", "high", sub(TRY_WAIT, PASS, 5)),
    "down_bwd: half of a quad left out of the router gradient": (
        "down_bwd",
        "high",
        no_exchange(2, "0", r"\s+mov\.b32\s+%f\d+, %r\d+;\s+add\.f32"),
    ),
    "down_bwd: neighbors of a quad do not exchange": ("down_bwd", "high", no_exchange(1)),
    "up, stored: multiplied as if along K": ("up stored", "high", sub(B_ALONG_N, r"\1, 0, 0;")),
    "up, stored: full wait dropped": ("up stored", "low", wait_before(B_ALONG_N)),
    "up, stored: a box of w_gate_up 8 features further": (
        "up stored",
        "high",
        sub(DENSE_SIDE, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "up, stored: half of w_gate_up not multicast": (
        "up stored",
        "pair",
        sub(MULTICAST, r"\1\2\3"),
    ),
    "down_bwd, stored: multiplied as if along N": (
        "down_bwd stored",
        "high",
        sub(ALONG_K, r"\1, 0, 1;"),
    ),
    "down_bwd, stored: full wait dropped": ("down_bwd stored", "high", wait_before(ALONG_K)),
    "wgrad_down: gathered rows announced before they are there": (
        "wgrad_down",
        "128x256",
        sub(ARRIVE, r"mbarrier.arrive\1 _, \2;"),
    ),
    # The last read is that of the loop, for the stage after.
    "wgrad_down: index of the next row": (
        "wgrad_down",
        "128x256",
        sub(r"(ld\.global\.nc\.s32 %r\d+, \[%rd\d+)\]", r"\1+4]", -1),
    ),
    "wgrad_down: a quarter of the rows are slots, not tokens": (
        "wgrad_down",
        "128x256",
        sub(DIVISION, r"mov.b32 \1, \2;", -1),
    ),
    "wgrad_down: half of the rows not multicast": (
        "wgrad_down",
        "128x256",
        sub(MULTICAST, r"\1\2\3"),
    ),
    "wgrad_down: remote release dropped": (
        "wgrad_down",
        "128x256",
        sub(r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];", "", 0),
    ),
    "wgrad_up: an eighth of x not copied": ("wgrad_up", "128x256", sub(COPY, "", 0)),
    "wgrad_up: empty wait dropped": (
        "wgrad_up",
        "128x256",
        wait_before(r"mbarrier\.arrive\.expect_tx"),
    ),
    "few: lanes do not exchange": ("few", "", no_exchange((4, 8))),
    "few, stored: multiplied as if along k": ("few stored", "", sub(A_ALONG_M, r"\1, 0, 0;")),
    "few, stored: second block of weights 8 features further": (
        "few stored",
        "",
        sub(DENSE_SIDE, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "few, stored: gate and up do not meet": ("few stored", "", no_exchange(4)),
    "few, stored: neighbors do not exchange": ("few stored", "", no_exchange((4, 8))),
    "few: second block of weights 8 rows further": (
        "few",
        "",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "few: empty wait dropped": ("few", "", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "few: experts are counted before their counts are zero": ("few", "", sub(BARRIER, "", 0)),
    "few: an expert is looked for before all are counted": ("few", "", sub(BARRIER, "", 1)),
    "few: slots are read before they are listed": ("few", "", sub(BARRIER, "", 3)),
    "few: a slot's place counts the slot itself": (
        "few",
        "",
        sub(r"popc\.b32\s+(%r\d+), (%r\d+);(\s+add)", r"popc.b32 \1, \2; add.s32 \1, \1, 1;\3", 0),
    ),
    "few: first block of weights of the next expert": (
        "few",
        "",
        sub(LOAD_B, added(r"\2", 1) + r"\1q\3 }", 0),
    ),
}


def name_parts(kernel: str, tile: str) -> tuple[str, ...]:
    """Returns the template arguments in the kernel's name, as csrc/cuda/moe_ffn numbers them. A
    module holds all kernels of a stage."""
    if kernel.startswith("few"):
        return ("sm90_few_rows_kernel", "Li32E")  # up to 32 tokens
    if kernel.startswith("wgrad"):  # as csrc/cuda/grouped_gemm/config.h numbers them
        return (f"ProductE{5 if kernel == 'wgrad_down' else 6}E", "TileShapeE0E")
    tiles = f"FfnTileE{('low', 'high', 'pair').index(tile)}E"
    layouts = {"up_joint": ("GateUpE1E",)}
    return (tiles, *layouts.get(kernel, ("GateUpE0E",) if kernel.startswith("up") else ()))


def make_case(kernel: str, tile: str) -> Case:
    """Sums longer than the ring; with two SMs at least three tiles a block."""
    # An expert of two row tiles, and one of a tile alone.
    routing = Routing(200, 3, 2, "skewed")
    if kernel.startswith("few"):
        routing = Routing(30, 3, 2, "dropped")
    elif kernel.startswith("wgrad"):
        routing = Routing(300, 3, 2, "skewed")
    activation = "swiglu_oai" if kernel == "few stored" else "swiglu"
    call = ffn_operands(routing, 520, 136, torch.bfloat16, activation=activation, bias=True)
    call["interleaved"] = kernel in ("few stored", "up_joint")
    if kernel.endswith("stored"):
        call = stored(call)
    forward = kernel.startswith(("up", "few"))
    case = forward_case(call) if forward else backward_case(call, kernel)
    case.kernel = name_parts(kernel, tile)
    # The weight gradients are kernels of the grouped products.
    of_product = kernel.startswith("wgrad")
    case.env = {
        "MOE_OPS_GEMM_TILE": tile if of_product else "",
        "MOE_OPS_FFN_TILE": "" if of_product else tile,
    }
    return case


def forward_case(call: dict[str, torch.Tensor]) -> Case:
    experts = call["w_down"].shape[0]
    return Case(
        run=lambda: moe_ops.moe_ffn(**call),
        prepare=lambda: moe_ops.sort_by_expert(call["topk_ids"], experts),
        kernel=(),
    )


def backward_case(call: dict[str, torch.Tensor], kernel: str) -> Case:
    """The gradients of w_down, of the routing weights and of b_gate_up, or what a weight gradient
    takes; the forward that saves what they need comes before."""
    grad = torch.randn_like(call["x"])
    operands = [call[n] for n in ("x", "w_gate_up", "w_down", "topk_weights")]
    options = ("swiglu", False, False, 1.702, 7.0)
    of_product, of_up = kernel.startswith("wgrad"), kernel == "wgrad_up"
    wanted = (False, False, True, True, True, False)
    if of_product:
        wanted = (False, of_up, not of_up, True, False, False)
    saved: list[torch.Tensor] = []

    def forward() -> None:
        saved[:] = torch.ops.moe_ops.moe_ffn_fwd(
            *operands, call["topk_ids"], call["b_gate_up"], call["b_down"]
        )[1:]
        if of_product:
            # The stage before has run, so that the weight gradient is the next module to load.
            backward((False, False, False, True, False, False))

    def backward(gradients: tuple[bool, ...]) -> tuple[torch.Tensor, ...]:
        return torch.ops.moe_ops.moe_ffn_bwd(
            grad, *operands, *saved, call["b_down"], *options, *gradients
        )

    return Case(run=lambda: backward(wanted), prepare=forward, kernel=())


if __name__ == "__main__":
    main(MUTANTS, make_case)
