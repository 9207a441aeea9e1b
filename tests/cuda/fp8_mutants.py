"""Breaks the PTX of the fp8 kernels for sm_90a in one place at a time and asks whether the
simulator notices, as sm90_mutants.py, whose parts it takes. Run by test_grouped_gemm_fp8.py; prints
{mutant: how it was noticed, or null} as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from sm90_mutants import (
    EXPECT,
    INIT,
    LOAD_A,
    LOAD_B,
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
from tests.helpers.fp8 import fp8_gemm_operands, fp8_wgrad_operands
from tests.helpers.simulator import use_simulator

import moe_ops

LOAD_SCALE = r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]"
LIMITS = {"sms": 2, "livelock_insts": 3_000_000, "max_insts": 20_000_000, "race": 1}

# As the enum of csrc/cuda/grouped_gemm_fp8/sm90.h numbers them.
TILES = ("2x128x128", "128x128", "64x128")
WGRAD = "wgrad"  # the kernel of grouped_gemm_fp8_wgrad, which has one tile
LOAD_SCALES = r"(ld\.global\.nc\.v2\.f32 \{%f\d+,%f\d+\}, \[%rd\d+)(\+\d+)?\]"

# name: (tile, mutation). The order of barrier waits is as in the kernels of grouped_gemm.
MUTANTS: dict[str, tuple[str, Mutation]] = {
    "consumer: full wait dropped": ("128x128", wait_before(r"wgmma\.fence")),
    "producer: empty wait dropped": ("128x128", wait_before(r"mbarrier\.arrive\.expect_tx")),
    "ping-pong: turn wait dropped": ("64x128", sub(TRY_WAIT, PASS, 0)),
    "products not awaited": ("128x128", sub(r"wgmma\.wait_group\.sync\.aligned 0;", "")),
    "wgmma.fence dropped": ("128x128", sub(r"wgmma\.fence\.sync\.aligned;", "")),
    "release dropped": (
        "128x128",
        sub(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 0),
    ),
    "expected bytes 32 short": ("128x128", sub(EXPECT, added(r"\2", -32) + r"\1q; }")),
    "empty barrier counts one warp less": (
        "128x128",
        sub(INIT, added(r"\2", -1) + r"\1q; }", 1),
    ),
    "A box 16 columns further": ("128x128", sub(LOAD_A, added(r"\2", 16) + r"\1q\3 }")),
    "B box of the next expert": ("64x128", sub(LOAD_B, added(r"\2", 1) + r"\1q\3 }")),
    "descriptor advances 64 bytes for 32": (
        "64x128",
        sub(r"add\.s32 (%r\d+), (%r\d+), 2;(\s*mov\.b64 %rd\d+, \{)", r"add.s32 \1, \2, 4;\3", 0),
    ),
    "products of a block added to those before": (
        "128x128",
        sub(r"(setp\.ne\.b32 p, )(%r\d+|0)(, 0;)", r"\g<1>1\3", 0),
    ),
    # The order of loads: of the first block a, a, b, of the others a, a, b.
    "scale of a of the block after": ("128x128", sub(LOAD_SCALE, r"\1+4]", 3)),
    "scale of b of the block after": ("128x128", sub(LOAD_SCALE, r"\1+4]", 5)),
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


def operands(tile: str) -> dict[str, torch.Tensor]:
    """Sums longer than the ring, several tiles a block, experts that end inside a tile or group."""
    torch.manual_seed(5)
    if tile == WGRAD:
        return fp8_wgrad_operands((1100, 3, 0, 300), 264, 136)
    return fp8_gemm_operands((130, 3, 0, 300, 70), 1168, 136)


def run(call: dict[str, torch.Tensor]) -> torch.Tensor:
    op = moe_ops.grouped_gemm_fp8 if "b" in call else moe_ops.grouped_gemm_fp8_wgrad
    return op(**call, out_dtype=torch.float32)


def how_noticed(call: dict[str, torch.Tensor], expected: torch.Tensor) -> str:
    simulator = Simulator()
    simulator.set(**LIMITS)
    for seed, delay in SCHEDULES:
        simulator.set(seed=seed, async_delay=delay)
        try:
            out = run(call)
        except RuntimeError as error:
            return f"error: {str(error)[:200]}"
        warnings = simulator.warnings()
        if warnings:
            return f"warning: {warnings[:200]}"
        if not torch.equal(out.view(torch.int32), expected.view(torch.int32)):
            return "other bits"
    return ""


def main(only: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        kernels: dict[str, tuple[str, torch.Tensor]] = {}
        for name, (tile, mutate) in MUTANTS.items():
            if only and name not in only:
                continue
            os.environ["MOE_OPS_GEMM_TILE"] = tile
            call = operands(tile)
            if tile not in kernels:
                prefix = f"{folder}/{tile}"

                def dump(prefix=prefix, call=call) -> str:
                    simulator = Simulator()
                    simulator.set(sms=2, race=1)
                    torch.save(run(call), prefix + ".pt")
                    return simulator.warnings()

                warned = in_child({"PTXSIM_DUMP_PTX": prefix}, dump)
                assert warned == "", warned
                ptx = Path(prefix + ".0.ptx").read_text()
                kernels[tile] = ptx, torch.load(prefix + ".pt")
            ptx, expected = kernels[tile]
            changed = Path(folder, "mutant.ptx")
            # Of the kernels in the module, that of the tile whose rows are not gathered.
            kernel = "fp8_wgrad" if tile == WGRAD else f"TileShapeE{TILES.index(tile)}ELb0E"
            changed.write_text(in_kernel(mutate, kernel)(ptx))

            def notice(expected=expected, call=call) -> str:
                return how_noticed(call, expected)

            result[name] = in_child({"PTXSIM_OVERRIDE_PTX": str(changed)}, notice) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
