"""Breaks the PTX of attention's sm_90a kernels in one place at a time and asks whether the simulator
notices. Run by test_moa_attention.py; prints {mutant: how it was noticed, or null} as JSON.

A process writes out or replaces the first module that it loads with the variable set: what a
backward needs besides is loaded before.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from sm90_mutants import (
    EXPECT,
    PASS,
    SCHEDULES,
    TRY_WAIT,
    Mutation,
    Simulator,
    added,
    in_child,
    in_kernel,
    sub,
    wait_before,
)
from tests.helpers.simulator import use_simulator

import moe_ops

BOX = r"(cp\.async\.bulk\.tensor\.4d[^;]*?\{%r\d+, )(%r\d+)(, %r\d+, %r\d+\}[^;]*;)"
NO_WAIT = sub(r"wgmma\.wait_group\.sync\.aligned 0;", "")
NOT_ALL = sub(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 7;")
NO_FENCE = sub(r"wgmma\.fence\.sync\.aligned;", "")
SHORT = sub(EXPECT, added(r"\2", -32) + r"\1q; }")
FLAG = r"ld\.acquire\.gpu\.global\.s32 (%r\d+), \[[^;]*\];"
RAISED = r"st\.release\.gpu\.global\.s32 (\[[^;]*\]), (%r\d+);"
MEET = r"barrier\.cta\.red\.or\.pred"

# name: (pass, kind, mutation).
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    "forward: keys not awaited": ("forward", "softmax", wait_before(r"wgmma\.fence")),
    "forward: stages not awaited by the producer": (
        "forward",
        "softmax",
        wait_before(r"mbarrier\.arrive\.expect_tx"),
    ),
    "forward: values not awaited": ("forward", "softmax", sub(TRY_WAIT, PASS, -1)),
    "forward: scores not awaited": ("forward", "softmax", NOT_ALL),
    "forward: values not added when rows are scaled": ("forward", "softmax", NO_WAIT),
    "forward: wgmma.fence dropped": ("forward", "softmax", NO_FENCE),
    "forward: expected bytes 32 short": ("forward", "softmax", SHORT),
    "forward: turn not passed": ("forward", "softmax", sub(r"bar\.arrive [^;]*;", "", 1)),
    "forward: boxes 8 lines further": (
        "forward",
        "softmax",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }"),
    ),
    "forward: consumers of sticks do not meet": (
        "forward",
        "stick_breaking",
        sub(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 0),
    ),
    "forward: tiles that nobody took not skipped": (
        "forward",
        "stick_breaking",
        sub(r"ld\.volatile\.shared\.u32 (%r\d+), [^;]*;", r"mov.b32 \1, 0;", -1),
    ),
    "backward: parts taken before they are there": (
        "backward",
        "softmax",
        sub(FLAG, r"mov.b32 \1, 1000;"),
    ),
    "backward: parts never handed on": ("backward", "softmax", sub(RAISED, "")),
    "backward: flag one too high": (
        "backward",
        "softmax",
        sub(RAISED, added(r"\2", 1) + r"st.release.gpu.global.s32 \1, q; }"),
    ),
    "backward: parts not added": (
        "backward",
        "softmax",
        sub(r"ld\.global\.cg\.v4\.f32 \{(%f\d+), (%f\d+), (%f\d+), (%f\d+)\}, [^;]*;",
            r"mov.f32 \1, 0f00000000; mov.f32 \2, 0f00000000; mov.f32 \3, 0f00000000; "
            r"mov.f32 \4, 0f00000000;"),
    ),  # fmt: skip
    "backward: one octet of scores elsewhere": (
        "backward",
        "softmax",
        sub(r"xor\.b32\s+(%r\d+), (%r\d+), 32;", r"mov.b32 \1, \2;", 0),
    ),
    "backward: warpgroups do not meet": (
        "backward",
        "softmax",
        sub(MEET + r" b, 1, 256, a;|" + MEET + r" b, %r\d+, %r\d+, a;", "mov.pred b, a;", -1),
    ),
    "backward: weights not awaited by their warpgroup": (
        "backward",
        "softmax",
        sub(r"bar\.sync %r\d+, 128;|bar\.sync %r\d+, %r\d+;", ""),
    ),
    "backward: scores without a proxy fence": (
        "backward",
        "softmax",
        sub(r"fence\.proxy\.async\.shared::cta;", ""),
    ),
    "backward: rows released under a running product": ("backward", "softmax", NOT_ALL),
    "backward: products not awaited": ("backward", "softmax", NO_WAIT),
    "backward: wgmma.fence dropped": ("backward", "softmax", NO_FENCE),
    "backward: expected bytes 32 short": ("backward", "softmax", SHORT),
    "backward: boxes 8 lines further": (
        "backward",
        "softmax",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }"),
    ),
    "backward: sums of sticks taken before they are there": (
        "backward",
        "stick_breaking",
        sub(FLAG, r"mov.b32 \1, 1000;", 0),
    ),
    "backward: sums of sticks never handed on": ("backward", "stick_breaking", sub(RAISED, "", 0)),
}


def operands(kind: str) -> dict[str, torch.Tensor]:
    """Several tiles of keys and of rows, and more of them than blocks."""
    torch.manual_seed(5)
    q = torch.randn(1, 150, 2, 2, 64).bfloat16()
    k, v = (torch.randn(1, 300, 2, 64).bfloat16() for _ in range(2))
    if kind == "stick_breaking":  # some sticks last
        q, k = q.abs(), -k.abs() / 4
    return {"q": q, "k": k, "v": v, "kind": kind}


def run(direction: str, call: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if direction == "forward":
        out = moe_ops.moa_attention(**call)
        return out if isinstance(out, tuple) else (out,)
    leaves = {name: call[name].detach().requires_grad_() for name in "qkv"}
    out = moe_ops.moa_attention(**{**call, **leaves})
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.linspace(-1, 1, o.numel()).reshape(o.shape).to(o.dtype) for o in outs]
    return torch.autograd.grad(outs, list(leaves.values()), grads)


def load_others(direction: str, kind: str) -> None:
    """All modules but that of the kernel."""
    if direction == "backward":
        run("forward", operands(kind))
        few = {n: t[:, :1] if n in "qkv" else t for n, t in operands(kind).items()}
        run("backward", few)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def how_noticed(direction: str, call: dict, expected: tuple[torch.Tensor, ...]) -> str:
    simulator = Simulator()
    simulator.set(sms=3, livelock_insts=3_000_000, max_insts=60_000_000, race=1)
    for seed, delay in SCHEDULES:
        simulator.set(seed=seed, async_delay=delay)
        try:
            out = run(direction, call)
        except RuntimeError as error:
            return f"error: {str(error)[:200]}"
        warnings = simulator.warnings()
        if warnings:
            return f"warning: {warnings[:200]}"
        if not same(out, expected):
            return "other bits"
    return ""


def main(only: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        kernels: dict[tuple[str, str], tuple[str, tuple[torch.Tensor, ...]]] = {}
        for name, (direction, kind, mutate) in MUTANTS.items():
            if only and name not in only:
                continue
            call = operands(kind)
            if (direction, kind) not in kernels:
                prefix = f"{folder}/{direction}_{kind}"

                def dump(direction=direction, kind=kind, call=call, prefix=prefix) -> str:
                    load_others(direction, kind)
                    os.environ["PTXSIM_DUMP_PTX"] = prefix
                    simulator = Simulator()
                    simulator.set(sms=3, race=1)
                    torch.save(run(direction, call), prefix + ".pt")
                    return simulator.warnings()

                warned = in_child({}, dump)
                assert warned == "", warned
                kernels[direction, kind] = (prefix, torch.load(prefix + ".pt"))
            prefix, expected = kernels[direction, kind]
            kernel = {"forward": "moa_attention_sm90_kernel", "backward": "sm90_bwd_kernel"}
            number = {"softmax": 0, "stick_breaking": 1}[kind]
            changed = Path(folder, "mutant.ptx")
            ptx = Path(prefix + ".0.ptx").read_text()
            changed.write_text(
                in_kernel(mutate, kernel[direction], f"AttentionKindE{number}ELi64")(ptx)
            )

            def notice(direction=direction, kind=kind, call=call, expected=expected) -> str:
                load_others(direction, kind)
                os.environ["PTXSIM_OVERRIDE_PTX"] = str(changed)
                return how_noticed(direction, call, expected)

            result[name] = in_child({}, notice) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
