"""Breaks the PTX of the fp8 kernels for sm_90a (tests/helpers/ptx_mutants.py). Run by
test_grouped_gemm_fp8.py."""

from __future__ import annotations

import torch
from tests.helpers.fp8 import fp8_gemm_operands, fp8_wgrad_operands
from tests.helpers.ptx_mutants import (
    EXPECT,
    INIT,
    LOAD_A,
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

import moe_ops

LOAD_SCALE = r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]"

# As the enum of csrc/cuda/grouped_gemm_fp8/sm90.h numbers them.
TILES = ("2x128x256", "128x256", "64x128")
WGRAD = "wgrad"  # the kernel of grouped_gemm_fp8_wgrad, which has one tile
LOAD_SCALES = r"(ld\.global\.nc\.v2\.f32 \{%f\d+,%f\d+\}, \[%rd\d+)(\+\d+)?\]"

# name: (tile, mutation). The order of barrier waits is as in the kernels of grouped_gemm.
MUTANTS: dict[str, tuple[str, Mutation]] = {
    "consumer: full wait dropped": ("128x256", wait_before(r"wgmma\.fence")),
    "producer: empty wait dropped": ("128x256", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "ping-pong: turn wait dropped": ("64x128", sub(TRY_WAIT, PASS, 0)),
    "products not awaited": ("128x256", sub(r"wgmma\.wait_group\.sync\.aligned 0;", "")),
    "wgmma.fence dropped": ("128x256", sub(r"wgmma\.fence\.sync\.aligned;", "")),
    "release dropped": (
        "128x256",
        sub(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 0),
    ),
    "expected bytes 32 short": ("128x256", sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "empty barrier counts one warp less": (
        "128x256",
        sub(INIT, added(r"\2", -1) + r"\1q; }", 1),
    ),
    "A box 16 columns further": ("128x256", sub(LOAD_A, added(r"\2", 16) + r"\1q\3 }")),
    "B box of the next expert": ("64x128", sub(LOAD_B, added(r"\2", 1) + r"\1q\3 }")),
    "descriptor advances 64 bytes for 32": (
        "64x128",
        sub(r"add\.s32 (%r\d+), (%r\d+), 2;(\s*mov\.b64 %rd\d+, \{)", r"add.s32 \1, \2, 4;\3", 0),
    ),
    "products of a block added to those before": (
        "128x256",
        sub(r"(setp\.ne\.b32 p, )(%r\d+|0)(, 0;)", r"\g<1>1\3", 0),
    ),
    # The order of loads: b, a, a, and b of the second part.
    "scale of a of the block after": ("128x256", sub(LOAD_SCALE, r"\1+4]", 1)),
    "scale of b of the block after": ("128x256", sub(LOAD_SCALE, r"\1+4]", 0)),
    "scale of b of the block after, second part": ("128x256", sub(LOAD_SCALE, r"\1+4]", 3)),
    "products of the second part not awaited": (
        "128x256",
        sub(r"wgmma\.wait_group\.sync\.aligned 0;", "", 1),
    ),
    "half of B not multicast": (
        "2x128x256",
        sub(
            r"(cp\.async\.bulk\.tensor\.3d[^;]*?)\.multicast::cluster([^;]*?), %rs\d+(, %rd\d+;)",
            r"\1\2\3",
        ),
    ),
    "box filled while it is read": ("128x256", sub(boxes_read(1), "")),
    "rows of the next expert stored": (
        "2x128x256",
        sub(STORE, added(r"\4", -1) + r"\1\2\3q\5\6\7 }"),
    ),
    "wgrad: full wait dropped": (WGRAD, wait_before(r"wgmma\.fence")),
    "wgrad: empty wait dropped": (WGRAD, wait_before(r"mbarrier\.arrive\.expect_tx")),
    "wgrad: products not awaited": (WGRAD, sub(r"wgmma\.wait_group\.sync\.aligned 0;", "")),
    "wgrad: wgmma.fence dropped": (WGRAD, sub(r"wgmma\.fence\.sync\.aligned;", "")),
    "wgrad: expected bytes 32 short": (WGRAD, sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "wgrad: empty barrier counts one warp less": (
        WGRAD,
        sub(INIT, added(r"\2", -1) + r"\1q; }", 1),
    ),
    "wgrad: grad box of the group after": (WGRAD, sub(LOAD_A, added(r"\2", 128) + r"\1q\3 }")),
    "wgrad: products of a group added to those before": (
        WGRAD,
        sub(r"(setp\.ne\.b32 p, )(%r\d+|0)(, 0;)", r"\g<1>1\3", 0),
    ),
    "wgrad: scale of grad of the next row": (WGRAD, sub(LOAD_SCALE, r"\1+4]", 0)),
    "wgrad: scales of a of other columns": (WGRAD, sub(LOAD_SCALES, r"\1+16]")),
}


def make_case(tile: str) -> Case:
    """Sums longer than the ring, several tiles a block, experts that end inside a tile or group. Of
    the kernels in the module, that of the tile whose rows are not gathered."""
    if tile == WGRAD:
        call = fp8_wgrad_operands((1100, 3, 0, 300), 264, 136)
        op, kernel, dtype = moe_ops.grouped_gemm_fp8_wgrad, "fp8_wgrad", torch.float32
    else:
        call = fp8_gemm_operands((130, 3, 0, 300, 70), 1168, 264)
        op, kernel = moe_ops.grouped_gemm_fp8, f"TileShapeE{TILES.index(tile)}ELb0E"
        dtype = torch.bfloat16  # stored through boxes
    return Case(
        run=lambda: op(**call, out_dtype=dtype),
        kernel=(kernel,),
        env={"MOE_OPS_GEMM_TILE": tile},
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
