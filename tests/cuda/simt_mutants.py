"""Breaks the PTX of the routing and permutation kernels (tests/helpers/ptx_mutants.py). Run by
test_simt_mutants.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.helpers.ptx_mutants import Case, Mutation, main, sub
from tests.helpers.routing import Routing

import moe_ops

Call = Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]


def sort_by_expert() -> Call:
    """One block with slots in several warps."""
    ids = Routing(300, 6, 8, "dropped").ids()
    return lambda: moe_ops.sort_by_expert(ids, 6)


def topk_router() -> Call:
    """Groups that are no run of lanes; a bias; ties within lanes; a NaN."""
    logits, bias = torch.randn(4, 60), torch.randn(60)
    logits[:2, 1::2], bias[1::2] = logits[:2, ::2], bias[::2]
    logits[3, 7] = torch.nan
    options = {"score_func": "sigmoid", "num_groups": 5, "num_topk_groups": 2, "expert_bias": bias}
    return lambda: moe_ops.topk_router(logits, 6, **options)


def router_bwd() -> Call:
    """fp64 rows that do not fit into registers; an expert that two slots name."""
    logits, grad = torch.randn(3, 300).double(), torch.randn(3, 5).double()
    ids = torch.randint(300, (3, 5), dtype=torch.int32)
    ids[:, 3] = ids[:, 1]
    bwd = torch.ops.moe_ops.topk_router_bwd
    return lambda: bwd(grad, logits, ids, "softmax", False, False, 1.5)


def topp_router() -> Call:
    """More than 32 experts taken, renormalized."""
    logits = 0.1 * torch.randn(3, 60)
    return lambda: moe_ops.topp_router(logits, 0.8, renormalize=True)


def expert_choice_router() -> Call:
    """Scores of few values: ties that several rounds of a block look through."""
    logits = torch.randn(1200, 3).round()
    return lambda: moe_ops.expert_choice_router(logits, 700)


def grouped_sum() -> Call:
    offsets = torch.tensor([0, 70, 70, 82], dtype=torch.int32)
    rows = torch.randn(90, 40)
    return lambda: moe_ops.grouped_sum(rows, offsets)


def unpermute_bwd() -> Call:
    """Rows that several slots name, and none."""
    routing = Routing(23, 5, 3, "dropped")
    offsets, _, _ = routing.sorted()
    slot_to_row = torch.randint(69, (23, 3), dtype=torch.int32)
    rows, weights, grad = torch.randn(69, 40), torch.rand(23, 3), torch.randn(23, 40)
    bwd = torch.ops.moe_ops.unpermute_bwd
    return lambda: bwd(grad, rows, offsets, slot_to_row, weights)


def permute_bwd() -> Call:
    """Slots that several rows name, and none."""
    offsets = torch.tensor([0, 20, 60], dtype=torch.int32)
    row_to_slot = torch.randint(69, (69,), dtype=torch.int32)
    grad = torch.randn(69, 40)
    bwd = torch.ops.moe_ops.permute_bwd
    return lambda: bwd(grad, offsets, row_to_slot, 23)


BARRIER = r"bar\.sync 0;"
BALLOT = r"vote\.sync\.ballot\.b32 (%r\d+), [^;]*;"

# name: (call, parts of the kernel's name, mutation)
MUTANTS: dict[str, tuple[Callable[[], Call], tuple[str, ...], Mutation]] = {
    "tables are counted in before they are zero": (
        sort_by_expert,
        ("place_kernel", "IiLb1"),
        sub(BARRIER, "", 0),
    ),
    "first rows are found before all slots are counted": (
        sort_by_expert,
        ("place_kernel", "IiLb1"),
        sub(BARRIER, "", 1),
    ),
    "slots are placed before all first rows are found": (
        sort_by_expert,
        ("place_kernel", "IiLb1"),
        sub(BARRIER, "", 4),
    ),
    "a rank counts the lane itself": (
        sort_by_expert,
        ("place_kernel", "IiLb1"),
        sub(r"popc\.b32 (%r\d+), (%r\d+);", r"popc.b32 \1, \2; add.s32 \1, \1, 1;", 0),
    ),
    "the bias is not added to a key": (
        topk_router,
        ("RegisterRowIfLi2",),
        sub(
            r"add\.f32 (%f\d+), (%f\d+), %f\d+;(\s*mov\.b32 %r\d+, \1;\s*setp\.eq\.f32)",
            r"mov.f32 \1, \2;\3",
            2,
        ),
    ),
    "one group too few is kept": (
        topk_router,
        ("RegisterRowIfLi2",),
        sub(
            r"(ld\.param\.u64 (%rd\d+), \[\w+\+80\];.*?cvt\.u32\.u64 (%r\d+), \2;)",
            r"\1 add.s32 \3, \3, -1;",
            0,
        ),
    ),
    "a tie in a lane goes to the larger id": (
        topk_router,
        ("RegisterRowIfLi2",),
        sub(r"setp\.gt\.u32", "setp.ge.u32"),
    ),
    "NaN ranks by its bits": (
        topk_router,
        ("RegisterRowIfLi2",),
        sub(r"setp\.num\.f32 (%p\d+), (%f\d+), \2;", r"setp.eq.u32 \1, 0, 0;"),
    ),
    "the mean of the softmax is left out": (
        router_bwd,
        ("MemoryRowId",),
        sub(
            r"sub\.f64 (%fd\d+), (%fd\d+), %fd\d+;"
            r"(\s*mul\.f64 %fd\d+, %fd\d+, %fd\d+;\s*mul\.f64 %fd\d+, \1,)",
            r"mov.f64 \1, \2;\3",
        ),
    ),
    "of the slots of an expert only the last counts": (
        router_bwd,
        ("MemoryRowId",),
        sub(r"add\.f64 (%fd\d+), \1, (%fd\d+);", r"mov.f64 \1, \2;", 7),
    ),
    "one expert too many": (
        topp_router,
        ("RegisterRowIfLi2",),
        sub(
            r"(cvt\.rn\.f32\.f64 (%f\d+), %fd\d+;)\s*setp\.ge\.f32 (%p\d+), \2, (%f\d+);",
            r"{ .reg .f32 q; \1 add.f32 q, \4, 0f3C23D70A; setp.ge.f32 \3, \2, q; }",  # + 0.01
        ),
    ),
    "a full batch is not renormalized": (
        topp_router,
        ("RegisterRowIfLi2",),
        sub(
            r"(ld\.global\.f32 (%f\d+), [^;]*;\s*)div\.rn\.f32 (%f\d+), \2, %f\d+;",
            r"\1mov.f32 \3, \2;",
        ),
    ),
    "the last token of a tie loses": (
        expert_choice_router,
        ("slot_kernelIf",),
        sub(r"setp\.le\.s64", "setp.lt.s64"),
    ),
    "counts are read before all keys are counted": (
        expert_choice_router,
        ("threshold_kernelIf",),
        sub(BARRIER, "", 1),
    ),
    "a digit is read before it is found": (
        expert_choice_router,
        ("threshold_kernelIf",),
        sub(BARRIER, "", 2),
    ),
    "keys with a higher digit keep their ranks": (
        expert_choice_router,
        ("threshold_kernelIf",),
        sub(r"sub\.s64 (%rd\d+), \1, %rd\d+;", "", 0),
    ),
    "earlier tokens of a tie keep their ranks": (
        expert_choice_router,
        ("threshold_kernelIf",),
        sub(r"sub\.s64 (%rd\d+), \1, %rd\d+;", "", 1),
    ),
    "partial sums are read before all are there": (
        grouped_sum,
        ("grouped_sum_kernelIffLi4",),
        sub(BARRIER, ""),
    ),
    "one row past the expert": (
        grouped_sum,
        ("grouped_sum_kernelIffLi4",),
        sub(r"setp\.ge\.s32 (%p\d+), (%r\d+), (%r\d+);", r"setp.gt.s32 \1, \2, \3;", 0),
    ),
    "a row without a slot is not written": (
        unpermute_bwd,
        ("unpermute_bwd_kernelIfLi4",),
        sub(r"st\.global\.v4\.u32 [^;]*;", ""),
    ),
    "further slots of a row are not found": (
        unpermute_bwd,
        ("unpermute_bwd_kernelIfLi4",),
        sub(BALLOT, r"mov.u32 \1, 0;"),
    ),
    "the first slot of a row is any": (
        unpermute_bwd,
        ("name_targets_kernel",),
        sub(r"atom\.global\.max\.s32", "atom.global.exch.b32", 0),
    ),
    "the last slot of a row is the first": (
        unpermute_bwd,
        ("name_targets_kernel",),
        sub(r"atom\.global\.max\.s32 %r\d+, (\[%rd\d+\]), (%r\d+);", r"st.global.u32 \1, 1;", 1),
    ),
    "further rows of a slot are left out": (
        permute_bwd,
        ("unpermute_kernelIffLi4",),
        sub(r"vote\.sync\.any\.pred (%p\d+), [^;]*;", r"setp.ne.u32 \1, 0, 0;"),
    ),
}


def make_case(make: Callable[[], Call], parts: tuple[str, ...]) -> Case:
    return Case(run=make(), kernel=parts)


if __name__ == "__main__":
    main(
        MUTANTS,
        make_case,
        options={"race": 1, "check_uninit": 1},
        schedules=[(seed, 40) for seed in (1, 2, 3, 4)],
    )
