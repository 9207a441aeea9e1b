"""Breaks the PTX of attention's sm_90a kernels (tests/helpers/ptx_mutants.py). Run by
test_moa_attention.py."""

from __future__ import annotations

from typing import Any

import torch
from tests.helpers.ptx_mutants import EXPECT, PASS, Case, Mutation, added, main, sub

import moe_ops

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\], %r\d+(?:, %r\d+)?;"
# Three items a block of the forward; three blocks of keys of each head at a time in the backward.
SMS = {"forward": 2, "backward": 6}
BOX = r"(cp\.async\.bulk\.tensor\.4d[^;]*?\{%r\d+, )(%r\d+)(, %r\d+, %r\d+\}[^;]*;)"
NO_WAIT = sub(r"wgmma\.wait_group\.sync\.aligned 0;", "")
NOT_ALL = sub(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 7;")
NO_FENCE = sub(r"wgmma\.fence\.sync\.aligned;", "")
SHORT = sub(EXPECT, added(r"\2", -32) + r"\1q; }")
FLAG = r"ld\.acquire\.gpu\.global\.s32 (%r\d+), \[[^;]*\];"
RAISED = r"st\.release\.gpu\.global\.s32 (\[[^;]*\]), (%r\d+);"
MEET = r"barrier\.cta\.red\.or\.pred b, %r\d+, %r\d+, a;"
PART = r"ld\.global\.cg\.v4\.f32 \{(%f\d+),(%f\d+),(%f\d+),(%f\d+)\}, [^;]*;"


def no_wait(nth: int) -> Mutation:
    """The nth barrier wait always passes."""
    return sub(WAIT, PASS, nth)


# Barrier waits of the forward are, in the order of the text: free stage (first keys), free rows
# (two), free stage (keys, values); rows, first keys, values that are searched, keys, values, keys
# that nobody wants, values. Of the backward: keys, first rows, next rows, free stages.
FORWARD: dict[str, Mutation] = {
    "stage of keys not awaited by the producer": no_wait(3),
    "stage of values not awaited by the producer": no_wait(4),
    "rows not awaited by the producer": no_wait(1),
    "rows not awaited": no_wait(5),
    "first keys not awaited": no_wait(6),
    "keys not awaited": no_wait(8),
    "values not awaited": no_wait(9),
    "scores not awaited": NOT_ALL,
    "values not added when rows are scaled": NO_WAIT,
    "wgmma.fence dropped": NO_FENCE,
    "expected bytes 32 short": SHORT,
    "turn not passed": sub(r"bar\.arrive [^;]*;", "", 1),
    "boxes 8 lines further": sub(BOX, added(r"\2", 8) + r"\1q\3 }"),
}
FORWARD_STICKS: dict[str, Mutation] = {
    "number of loaded tiles not announced": sub(
        r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 0
    ),
    "tiles that nobody took not skipped": sub(
        r"ld\.volatile\.shared\.u32 (%r\d+), [^;]*;", r"mov.b32 \1, 0;", -1
    ),
}
BACKWARD: dict[str, Mutation] = {
    "keys not awaited": no_wait(0),
    "first rows not awaited": no_wait(1),
    "rows not awaited": no_wait(2),
    "stage not awaited by the producer": no_wait(3),
    "parts taken before they are there": sub(FLAG, r"mov.b32 \1, 1000;"),
    "parts never handed on": sub(RAISED, ""),
    "flag one too high": sub(RAISED, added(r"\2", 1) + r"st.release.gpu.global.s32 \1, q; }"),
    "parts not added": sub(PART, " ".join(rf"mov.f32 \{i}, 0f00000000;" for i in range(1, 5))),
    "octets of scores elsewhere": sub(r"xor\.b32 (%r\d+), (%r\d+), 32;", r"mov.b32 \1, \2;", 0),
    "warpgroups do not meet": sub(MEET, "mov.pred b, a;", -1),
    "scores without a proxy fence": sub(r"fence\.proxy\.async\.shared::cta;", ""),
    "rows released under a running product": NOT_ALL,
    "products not awaited": NO_WAIT,
    "wgmma.fence dropped": NO_FENCE,
    "expected bytes 32 short": SHORT,
    "boxes 8 lines further": sub(BOX, added(r"\2", 8) + r"\1q\3 }"),
}
BACKWARD_STICKS: dict[str, Mutation] = {
    "sums taken before they are there": sub(FLAG, r"mov.b32 \1, 1000;", 0),
    "sums never handed on": sub(RAISED, "", 0),
    "sums of the first half not there": sub(MEET, "mov.pred b, a;", 2),
}
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    f"{direction}, {kind}: {name}": (direction, kind, mutate)
    for direction, kind, mutations in (
        ("forward", "softmax", FORWARD),
        ("forward", "stick_breaking", FORWARD_STICKS),
        ("backward", "softmax", BACKWARD),
        ("backward", "stick_breaking", BACKWARD_STICKS),
    )
    for name, mutate in mutations.items()
}


def operands(kind: str) -> dict[str, Any]:
    """More tiles of keys than stages, several tiles of rows, and more of them than blocks."""
    q = torch.randn(1, 150, 2, 2, 64).bfloat16()
    k, v = (torch.randn(1, 530, 2, 64).bfloat16() for _ in range(2))
    if kind == "stick_breaking":  # the sticks of a head last, those of the other do not
        q, k[:, :, 0] = q.abs(), -k[:, :, 0].abs() / 4
    return {"q": q, "k": k, "v": v, "kind": kind}


def run(direction: str, call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    if direction == "forward":
        out = moe_ops.moa_attention(**call)
        return out if isinstance(out, tuple) else (out,)
    leaves = {name: call[name].detach().requires_grad_() for name in "qkv"}
    out = moe_ops.moa_attention(**{**call, **leaves})
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.linspace(-1, 1, o.numel()).reshape(o.shape).to(o.dtype) for o in outs]
    return torch.autograd.grad(outs, list(leaves.values()), grads)


def make_case(direction: str, kind: str) -> Case:
    call = operands(kind)

    def load_others() -> None:
        """All modules but that of the backward."""
        run("forward", operands(kind))
        few = {n: t[:, :1] if n in "qkv" else t for n, t in operands(kind).items()}
        run("backward", few)

    kernel = {"forward": "moa_attention_sm90_kernel", "backward": "sm90_bwd_kernel"}
    number = {"softmax": 0, "stick_breaking": 1}[kind]
    return Case(
        run=lambda: run(direction, call),
        prepare=load_others if direction == "backward" else lambda: None,
        kernel=(kernel[direction], f"AttentionKindE{number}ELi64"),
        options={"sms": SMS[direction], "max_insts": 100_000_000},
    )


if __name__ == "__main__":
    main(MUTANTS, make_case)
