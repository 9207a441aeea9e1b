"""Breaks the PTX of the grouped GEMMs for any card (tests/helpers/ptx_mutants.py). Run by
test_grouped_gemm.py."""

from __future__ import annotations

import torch
from tests.helpers.ptx_mutants import Case, Mutation, main, sub

import moe_ops

COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, )%r\d+;"
WAIT = r"cp\.async\.wait_group \d;"

# name: (product as in sm90_mutants.py, element type, tile, mutation). Only the kernel of that
# product and tile is changed.
MUTANTS: dict[str, tuple[str, str, str, Mutation]] = {
    "copies not awaited": ("nt", "bf16", "small", sub(WAIT, "")),
    "a stage too few awaited": ("nt", "bf16", "large", sub(WAIT, "cp.async.wait_group 3;")),
    "barrier before a stage is read dropped": ("nt", "bf16", "small", sub(r"bar\.sync 0;", "", 0)),
    "barrier between two tiles dropped": ("nt", "bf16", "large", sub(r"bar\.sync 0;", "", -1)),
    "copies of the loop not committed": (
        "nt",
        "bf16",
        "large",
        sub(r"cp\.async\.commit_group;", "", -1),
    ),
    "no zeros past the end of k": ("nt", "bf16", "large", sub(COPY, r"\g<1>16;")),
    "no zeros past the rows of an expert": ("tn", "bf16", "large", sub(COPY, r"\g<1>16;")),
    "a fragment turned": ("nt", "bf16", "small", sub(r"x4\.m8n8", "x4.trans.m8n8", 3)),
    "a fragment not turned": ("tn", "bf16", "small", sub(r"x4\.trans\.m8n8", "x4.m8n8", 2)),
    "a product left out": ("nt", "bf16", "large", sub(r"mma\.sync[^;]*;", "", 5)),
    "a place not swizzled": (
        "nt",
        "bf16",
        "small",
        sub(r"xor\.b32 (%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", 0),
    ),
    "tiles of experts summed wrongly": (
        "nt",
        "bf16",
        "small",
        sub(r"(shfl\.sync\.up\.b32 %r\d+\|%p\d+, %r\d+, )%r\d+", r"\g<1>1"),
    ),
    "a pair of results not stored": ("nt", "bf16", "large", sub(r"st\.global[^;]*;", "", 0)),
    "lanes of a quad do not exchange": (
        "nt",
        "bf16",
        "large",
        sub(r"shfl\.sync\.bfly\.b32 (%r\d+)\|%p\d+, (%r\d+), [^;]*;", r"mov.b32 \1, \2;", 5),
    ),
    "the next tile is read before it is found": (
        "nt",
        "bf16",
        "large",
        sub(r"bar\.sync 0;", "", 0),
    ),
    "rows of the step before are copied": (
        "tn",
        "bf16",
        "large",
        sub(r"st\.shared\.u64[^;]*;", "", -1),
    ),
    "rows are copied before they are looked up": (
        "tn",
        "bf16",
        "large",
        sub(r"bar\.sync 0;", "", 0),
    ),
    "fp32: a correction left out": ("nt", "fp32", "small", sub(r"mma\.sync[^;]*;", "", 0)),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of each expert: those of the small tile have few.
COUNTS = {"large": (130, 3, 0, 600, 70), "small": (70, 3, 0, 40, 33)}


def operands(product: str, dtype: torch.dtype, tile: str) -> dict[str, torch.Tensor]:
    """Sums longer than the ring, several tiles a block, experts that end inside a tile."""
    counts, n, k = COUNTS[tile], 136, 328
    rows = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    if product == "tn":
        n = 136 if tile == "large" else 64
        return {
            "grad": torch.randn(rows, n).to(dtype),
            "a": torch.randn(rows, 136).to(dtype),
            "expert_offsets": offsets,
        }
    b = torch.randn(len(counts), n, k).to(dtype)
    return {"a": torch.randn(rows, k).to(dtype), "b": b, "expert_offsets": offsets}


def make_case(product: str, dtype: str, tile: str) -> Case:
    op = moe_ops.grouped_gemm_wgrad if product == "tn" else moe_ops.grouped_gemm
    call = operands(product, DTYPES[dtype], tile)
    return Case(
        run=lambda: op(**call),
        kernel=(
            "grouped_wgrad_kernel" if product == "tn" else "grouped_gemm_kernel",
            "Li128ELi256E" if tile == "large" else "Li64ELi64E",
            "Lb0EEEv" if product == "tn" else "Lb1ELb1E",  # without factors; B [n][k]
        ),
        env={"MOE_OPS_GEMM_TILE": "generic"},
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
