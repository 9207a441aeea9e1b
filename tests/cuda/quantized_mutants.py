"""Breaks the PTX of the kernels of moe_ffn_quantized (tests/helpers/ptx_mutants.py). Run by
test_moe_ffn_quantized.py."""

from __future__ import annotations

import os

import torch
from tests.helpers.ptx_mutants import Case, Mutation, main, sub
from tests.helpers.quantized import quantized_operands
from tests.helpers.routing import Routing

import moe_ops


def own(kind: str) -> str:
    """A shuffle, with what it gives to and takes from."""
    return rf"shfl\.sync\.{kind}\.b32 (%r\d+)\|%p\d+, (%r\d+), [^;]*;"


KEEP = r"mov.b32 \1, \2;"

# name: (kernel, bits, mutation). Only the kernel that the call takes is changed.
MUTANTS: dict[str, tuple[str, int, Mutation]] = {
    "few: a word not exchanged": ("few", 4, sub(own("bfly"), KEEP, 0)),
    "few: the last word not exchanged": ("few", 4, sub(own("bfly"), KEEP, -1)),
    "few: the scale of the lane's own group": ("few", 4, sub(own("idx"), KEEP, -1)),
    "few: three bits of a code": ("few", 4, sub("0x000f000f", "0x000e000e", 3)),
    "few: a product left out": ("few", 4, sub(r"mma\.sync[^;]*;", "", 5)),
    "few: sums read before they are there": ("few", 8, sub(r"bar\.sync 0;", "", 0)),
    "few: sums of the next rows over those": ("few", 8, sub(r"bar\.sync 0;", "", -1)),
    "few: a partial sum left out": ("few", 8, sub(r"st\.shared[^;]*;", "", 3)),
    "few: a result not stored": ("few", 8, sub(r"st\.global[^;]*;", "", 0)),
    "tiles: copies not awaited": ("tiles", 8, sub(r"cp\.async\.wait_group \d;", "")),
    "tiles: barrier of a step dropped": ("tiles", 8, sub(r"bar\.sync 0;", "", 0)),
    "tiles: barrier between two tiles dropped": ("tiles", 8, sub(r"bar\.sync 0;", "", -1)),
    "tiles: codes not stored": ("tiles", 8, sub(r"st\.shared\.v4[^;]*;", "", 0)),
    "tiles: bytes in another order": ("tiles", 8, sub(r", 16704;", ", 16960;", 0)),
    "tiles: a scale not stored": ("tiles", 4, sub(r"st\.shared\.f32[^;]*;", "", -1)),
    "tiles: a product left out": ("tiles", 4, sub(r"mma\.sync[^;]*;", "", 5)),
}


def make_case(kernel: str, bits: int) -> Case:
    """Several passes over the rows of an expert, several steps and tiles a block. The call of the
    other kernel launches all that is not in the module of this one."""
    few = kernel == "few"
    routing = Routing(8 if few else 90, 3, 2, "dropped")
    call = quantized_operands(routing, 1152, 128, torch.bfloat16, bits, 32)
    if few:
        call["topk_ids"][:] = 1

    def run(which: str) -> torch.Tensor:
        os.environ["MOE_OPS_QUANT_KERNEL"] = which
        return moe_ops.moe_ffn_quantized(**call)

    group = 0 if bits == 8 else 32
    return Case(
        run=lambda: run(kernel),
        kernel=("quantized_few_kernel", f"Li{group}ELb1ELi1E")
        if few
        else ("quantized_tile_kernel", "Li64ELi128ELi64E", f"Li{bits}ELi{group}ELi2E"),
        prepare=lambda: run("tiles" if few else "few"),
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
