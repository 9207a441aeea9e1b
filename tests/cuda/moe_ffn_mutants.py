"""Breaks the PTX of moe_ffn's own sm_90a kernels in one place at a time and asks whether the
simulator notices. Run by test_moe_ffn_sm90.py; prints {mutant: how it was noticed, or null} as
JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from sm90_mutants import (
    PASS,
    SCHEDULES,
    TRY_WAIT,
    Mutation,
    Simulator,
    added,
    in_child,
    sub,
    wait_before,
)

import moe_ops
from moe_ops.testing import Routing, ffn_operands, use_simulator

BOX = r"(cp\.async\.bulk\.tensor\.3d[^;]*?\{%r\d+, )(%r\d+)(, %r\d+\}[^;]*;)"
COPY = r"cp\.async\.cg\.shared\.global[^;]*;"


def exchange(step: int) -> str:
    return rf"shfl\.sync\.bfly\.b32 (%r\d+)\|%p\d+, (%r\d+), {step}, 31, -1;"


# name: (kernel, tile, mutation)
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    "up: gathered rows read before they are there": (
        "up",
        "high",
        sub(r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64 \[%r\d+\];", ""),
    ),
    "up: gathered rows without a proxy fence": (
        "up",
        "high",
        sub(r"fence\.proxy\.async\.shared::cta;", ""),
    ),
    "up: pieces not swizzled": (
        "up",
        "high",
        sub(r"xor\.b32 (%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", 0),
    ),
    "up: rows are slots, not tokens": (
        "up",
        "high",
        sub(r"div\.s32 (%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"),
    ),
    "up: half of w_gate_up 8 rows further": (
        "up",
        "low",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "up: turn wait dropped": ("up", "low", sub(TRY_WAIT, PASS, 0)),
    "up: full wait dropped": ("up", "high", wait_before(r"wgmma\.fence")),
    "up: half of a quad not transposed": ("up", "high", sub(exchange(2), r"mov.b32 \1, \2;", 0)),
    "up: half of w_gate_up not multicast": (
        "up",
        "pair",
        sub(
            r"(cp\.async\.bulk\.tensor\.3d[^;]*?)\.multicast::cluster([^;]*?), %rs\d+(, %rd\d+;)",
            r"\1\2\3",
        ),
    ),
    "down_bwd: grad_y copied one row short": ("down_bwd", "high", sub(COPY, "", 0)),
    "down_bwd: turn wait dropped": ("down_bwd", "high", sub(TRY_WAIT, PASS, 0)),
    "down_bwd: half of a quad left out of the router gradient": (
        "down_bwd",
        "high",
        sub(exchange(2), r"mov.b32 \1, 0;", -1),
    ),
    "down_bwd: pre-activation not transposed": (
        "down_bwd",
        "high",
        sub(exchange(1), r"mov.b32 \1, \2;", 0),
    ),
    "few: lanes do not exchange": ("few", "", sub(exchange(4), r"mov.b32 \1, \2;")),
    "few: second block of weights 8 rows further": (
        "few",
        "",
        sub(BOX, added(r"\2", 8) + r"\1q\3 }", 1),
    ),
    "few: empty wait dropped": ("few", "", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "few: expert number off by one": (
        "few",
        "",
        sub(
            r"popc\.b32 (%r\d+), (%r\d+);",
            r"popc.b32 \1, \2; add.s32 \1, \1, 1;",
            0,
        ),
    ),
}


class Case:
    """Inputs of a kernel. prepare() runs what comes before it, run() it and what follows."""

    def __init__(self, kernel: str) -> None:
        torch.manual_seed(5)
        self.kernel = kernel
        routing = Routing(9, 4, 2, "dropped") if kernel == "few" else Routing(430, 3, 1, "dropped")
        self.call = ffn_operands(routing, 456, 264, torch.bfloat16, bias=True)
        self.grad = torch.randn_like(self.call["x"])
        self.arguments: tuple[object, ...] = ()

    def prepare(self) -> None:
        call = self.call
        experts = call["w_down"].shape[0]
        if self.kernel != "down_bwd":
            moe_ops.sort_slots(call["topk_ids"], experts)
            return
        names = ("x", "w_gate_up", "w_down", "topk_weights")
        _, *saved = torch.ops.moe_ops.moe_ffn_fwd(
            *(call[n] for n in names), call["topk_ids"], call["b_gate_up"], call["b_down"]
        )
        options = ("swiglu", False, False, 1.702, 7.0)
        # The gradients of w_down, of the routing weights and of b_gate_up.
        wanted = (False, False, True, True, True, False)
        self.arguments = (*(call[n] for n in names), *saved, call["b_down"], *options, *wanted)

    def run(self) -> torch.Tensor:
        """Everything that comes out, as bytes."""
        if self.kernel == "down_bwd":
            out = torch.ops.moe_ops.moe_ffn_bwd(self.grad, *self.arguments)
        else:
            out = (moe_ops.moe_ffn(**self.call),)
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in out])


def how_noticed(case: Case, expected: torch.Tensor, env: dict[str, str]) -> str:
    case.prepare()
    os.environ.update(env)
    simulator = Simulator()
    simulator.set(sms=2, livelock_insts=3_000_000, max_insts=40_000_000, race=1)
    for seed, delay in SCHEDULES:
        simulator.set(seed=seed, async_delay=delay)
        try:
            out = case.run()
        except RuntimeError as error:
            return f"error: {str(error)[:200]}"
        warnings = simulator.warnings()
        if warnings:
            return f"warning: {warnings[:200]}"
        if not torch.equal(out, expected):
            return "other bits"
    return ""


def main(only: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        kernels: dict[tuple[str, str], tuple[str, Case, torch.Tensor]] = {}
        for name, (kernel, tile, mutate) in MUTANTS.items():
            if only and name not in only:
                continue
            os.environ["MOE_OPS_FFN_TILE"] = tile
            if (kernel, tile) not in kernels:
                prefix = f"{folder}/{kernel}_{tile}"
                case = Case(kernel)

                def dump(case=case, prefix=prefix) -> str:
                    case.prepare()
                    os.environ["PTXSIM_DUMP_PTX"] = prefix
                    simulator = Simulator()
                    simulator.set(sms=2, race=1)
                    torch.save(case.run(), prefix + ".pt")
                    return simulator.warnings()

                warned = in_child({}, dump)
                assert warned == "", warned
                ptx = Path(prefix + ".0.ptx").read_text()
                kernels[kernel, tile] = (ptx, case, torch.load(prefix + ".pt"))
            ptx, case, expected = kernels[kernel, tile]
            changed = Path(folder, "mutant.ptx")
            changed.write_text(mutate(ptx))
            env = {"PTXSIM_OVERRIDE_PTX": str(changed)}

            def notice(case=case, expected=expected, env=env) -> str:
                return how_noticed(case, expected, env)

            result[name] = in_child({}, notice) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
