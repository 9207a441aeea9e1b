"""Breaks the PTX of the sm_90a grouped GEMMs (tests/helpers/ptx_mutants.py). Run by
test_grouped_gemm_sm90.py."""

from __future__ import annotations

import torch
from tests.helpers.ptx_mutants import (
    EXPECT,
    FENCE,
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

# Of a row tile without a partner: to whom B goes, and which half of it a block leaves out.
MASK = r"selp\.b16 (%rs\d+), 3, %rs\d+, %p\d+;"
NOT_LOADED = r"(selp\.b16 %rs\d+, 3, %rs\d+, (%p\d+);.*?)and\.pred (%p\d+), \2, (%p\d+);"

# name: (product, tile, mutation). The order of barrier waits in a ping-pong kernel is turn, full,
# empty; in a cooperative one full, empty.
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    "consumer: full wait dropped": ("nt", "128x128", wait_before(r"wgmma\.fence")),
    "producer: empty wait dropped": ("nt", "128x128", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "ping-pong: turn wait dropped": ("nt", "128x128", sub(TRY_WAIT, PASS, 0)),
    "products not awaited at the end": (
        "nt",
        "128x128",
        sub(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    ),
    "stage released under a running product": (
        "nt",
        "128x128",
        sub(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 7;"),
    ),
    "wgmma.fence dropped": ("nt", "128x128", sub(r"wgmma\.fence\.sync\.aligned;", "")),
    "release dropped": (
        "nt",
        "128x128",
        sub(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 0),
    ),
    "expected bytes 32 short": ("nt", "128x128", sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "empty barrier counts one warp less": (
        "nt",
        "128x256",
        sub(INIT, added(r"\2", -1) + r"\1q; }", 1),
    ),
    "A box 16 columns further": ("nt", "128x128", sub(LOAD_A, added(r"\2", 16) + r"\1q\3 }")),
    "B box of the next expert": ("nn", "128x128", sub(LOAD_B, added(r"\2", 1) + r"\1q\3 }")),
    "descriptor advances 64 bytes for 32": (
        "nt",
        "64x64",
        sub(r"add\.s32 (%r\d+), (%r\d+), 2;(\s*mov\.b64 %rd\d+, \{)", r"add.s32 \1, \2, 4;\3", 0),
    ),
    "remote release dropped": (
        "nt",
        "128x256",
        sub(r"mbarrier\.arrive\.shared::cluster\.b64 _, \[remAddr32\];", "", 0),
    ),
    "half of B not multicast": (
        "nt",
        "128x256",
        sub(
            r"(cp\.async\.bulk\.tensor\.3d[^;]*?)\.multicast::cluster([^;]*?), %rs\d+(, %rd\d+;)",
            r"\1\2\3",
        ),
    ),
    "box read before its writes are in order": ("nt", "128x256", sub(FENCE, "")),
    "box filled while it is read": ("nt", "128x256", sub(boxes_read(1), "")),
    "boxes of the last tile filled while they are read": (
        "nt",
        "128x256",
        sub(boxes_read(0), "", 0),
    ),
    "block ends before its boxes are read": ("nt", "128x256", sub(boxes_read(0), "", -1)),
    "rows of the next expert stored": (
        "nt",
        "128x256",
        sub(STORE, added(r"\4", -1) + r"\1\2\3q\5\6\7 }"),
    ),
    "box 8 columns further": ("nn", "128x256", sub(STORE, added(r"\2", 8) + r"\1q\3\4\5\6\7 }")),
    "stmatrix: rows not swizzled": (
        "nt",
        "128x256",
        sub(r"xor\.b32 (%r\d+), (%r\d+), 32;", r"mov.b32 \1, \2;"),
    ),
    "wgrad: box of the row before": (
        "tn",
        "128x256",
        sub(STORE, added(r"\6", -1) + r"\1\2\3\4\5q\7 }"),
    ),
    "lone row tile: B sent to both blocks": ("nt", "128x256", sub(MASK, r"mov.b16 \1, 3;")),
    "lone row tile: half of B not loaded": (
        "nn",
        "128x256",
        sub(NOT_LOADED, r"\1and.pred \3, \4, \4;"),
    ),
    # The order of a cooperative kernel: start of the second warpgroup, products, warpgroup without
    # rows, producer.
    "warpgroup without rows: full wait dropped": ("nt", "128x256", sub(TRY_WAIT, PASS, 2)),
    "wgrad: experts of even number twice in the order": (
        "tn",
        "128x256",
        sub(
            r"(st\.shared\.u16 \[[^\]]*\]), (%r\d+);",
            r"{ .reg .b32 q; and.b32 q, \2, 14; \1, q; }",
        ),
    ),
    "wgrad: rows of the next expert kept": (
        "tn",
        "128x128",
        sub(r"st\.shared\.v4\.u32 \[%r\d+\], [^;]*;", ""),
    ),
    "wgrad: zeros without a proxy fence": (
        "tn",
        "128x128",
        sub(r"fence\.proxy\.async\.shared::cta;", ""),
    ),
    "wgrad: zeros without a barrier": (
        "tn",
        "128x256",
        sub(r"bar\.sync %r\d+, %r\d+;|bar\.sync 1?[1-9], \d+;", ""),
    ),
}


def operands(product: str) -> dict[str, torch.Tensor]:
    """Sums longer than the ring, several tiles a block, experts that end inside a tile."""
    counts, n, k = (130, 3, 0, 600, 70), 264, 648
    rows = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    if product == "tn":
        return {
            "grad": torch.randn(rows, 264).bfloat16(),
            "a": torch.randn(rows, 264).bfloat16(),
            "expert_offsets": offsets,
        }
    b = torch.randn(len(counts), n, k).bfloat16()
    if product == "nn":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    return {"a": torch.randn(rows, k).bfloat16(), "b": b, "expert_offsets": offsets}


def make_case(product: str, tile: str) -> Case:
    """The name has the template arguments, as the enums of csrc/cuda/grouped_gemm/config.h number
    them. A module holds all kernels of a kind of product."""
    products, tiles = ("nt", "nn", "tn"), ("128x256", "128x128", "64x128", "64x64")
    call, op = (
        operands(product),
        moe_ops.grouped_gemm_wgrad if product == "tn" else moe_ops.grouped_gemm,
    )
    return Case(
        run=lambda: op(**call),
        kernel=(f"ProductE{products.index(product)}E", f"TileShapeE{tiles.index(tile)}E"),
        env={"MOE_OPS_GEMM_TILE": tile},
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
