"""Breaks the PTX of the weight gradient with row factors in one place at a time and asks whether
the simulator notices. Run by test_moe_linear_reduce.py; prints {mutant: how it was noticed, or
null} as JSON."""

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
    in_child,
    in_kernel,
    sub,
    wait_before,
)
from tests.helpers.routing import Routing
from tests.helpers.simulator import use_simulator

# The barrier after the fence is not among them: for the simulator a product of a warpgroup begins
# when all four warps have issued it, and each has written its lines by then.
MUTANTS: dict[str, Mutation] = {
    "turn wait dropped": sub(TRY_WAIT, PASS, 0),
    "full wait dropped": wait_before(r"ld\.shared\.v4"),
    "scaled lines without a proxy fence": sub(r"fence\.proxy\.async\.shared::cta;", ""),
    "a piece not scaled": sub(r"st\.shared\.v4\.\w+ \[%r\d+\+?\d*\], [^;]*;", "", 3),
    "factor of another row": sub(r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]", r"\1+4]", -1),
}


class Case:
    """Rows of two experts, sums longer than the ring, several tiles a block."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        routing = Routing(600, 2, 2, "dropped")
        self.h = torch.randn(600, 2, 136)
        self.w = torch.randn(2, 264, 136)
        self.weights = torch.rand(600, 2) + 0.1
        self.ids = routing.ids()
        self.grad = torch.randn(600, 264)

    def run(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        operands = (t.to(dtype) for t in (self.grad, self.h, self.w))
        grads = torch.ops.moe_ops.moe_linear_reduce_bwd(
            *operands, self.weights, self.ids, None, False, True, False, False
        )
        return grads[1]

    def prepare(self) -> None:
        """Loads what a call launches beside the kernel: the simulator replaces the first module
        that is loaded afterwards."""
        self.run(torch.float32)


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
        if not torch.equal(out.view(torch.int16), expected.view(torch.int16)):
            return "other bits"
    return ""


def main(only: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    os.environ.pop("MOE_OPS_GEMM_TILE", None)
    result: dict[str, str | None] = {}
    case = Case()
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/kernel"

        def dump() -> str:
            case.prepare()
            os.environ["PTXSIM_DUMP_PTX"] = prefix
            simulator = Simulator()
            simulator.set(sms=2, race=1)
            torch.save(case.run(), prefix + ".pt")
            return simulator.warnings()

        warned = in_child({}, dump)
        assert warned == "", warned
        ptx, expected = Path(prefix + ".0.ptx").read_text(), torch.load(prefix + ".pt")
        for name, mutate in MUTANTS.items():
            if only and name not in only:
                continue
            changed = Path(folder, "mutant.ptx")
            # The module also holds the weight gradients without factors.
            changed.write_text(in_kernel(mutate, "sm90_scaled_wgrad_kernel")(ptx))
            env = {"PTXSIM_OVERRIDE_PTX": str(changed)}
            result[name] = in_child({}, lambda env=env: how_noticed(case, expected, env)) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
