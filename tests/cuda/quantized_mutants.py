"""Breaks the PTX of the kernels of moe_ffn_quantized in one place at a time and asks whether the
simulator notices. Run by test_moe_ffn_quantized.py; prints {mutant: how it was noticed, or null} as
JSON. How mutants run: sm90_mutants.py."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from moe_linear_reduce_mutants import how_noticed
from sm90_mutants import Mutation, Simulator, in_child, in_kernel, sub
from tests.helpers.quantized import quantized_operands
from tests.helpers.routing import Routing
from tests.helpers.simulator import use_simulator

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


class Case:
    """Several passes over the rows of an expert, several steps and tiles a block."""

    def __init__(self, kernel: str, bits: int) -> None:
        torch.manual_seed(5)
        self.kernel = kernel
        tokens = 8 if kernel == "few" else 90
        routing = Routing(tokens, 3, 2, "dropped")
        self.call = quantized_operands(routing, 1152, 128, torch.bfloat16, bits, 32)
        if kernel == "few":
            self.call["topk_ids"][:] = 1

    def prepare(self) -> None:
        """Loads all modules but that of the kernel: the environment names the one that is loaded
        afterwards."""
        self._run("tiles" if self.kernel == "few" else "few")

    def run(self) -> torch.Tensor:
        return self._run(self.kernel)

    def _run(self, kernel: str) -> torch.Tensor:
        os.environ["MOE_OPS_QUANT_KERNEL"] = kernel
        return moe_ops.moe_ffn_quantized(**self.call)


def name_parts(kernel: str, bits: int) -> tuple[str, ...]:
    """What the name of the kernel has in it."""
    if kernel == "few":
        return "quantized_few_kernel", f"Li{0 if bits == 8 else 32}ELb1ELi1E"
    return "quantized_tile_kernel", "Li64ELi128ELi64E", f"Li{bits}ELi{0 if bits == 8 else 32}ELi2E"


def main(only: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        modules: dict[tuple[str, int], tuple[Case, str, torch.Tensor]] = {}
        for name, (kernel, bits, mutate) in MUTANTS.items():
            if only and name not in only:
                continue
            if (kernel, bits) not in modules:
                case, prefix = Case(kernel, bits), f"{folder}/{kernel}{bits}"

                def dump(case: Case = case, prefix: str = prefix) -> str:
                    case.prepare()
                    os.environ["PTXSIM_DUMP_PTX"] = prefix
                    simulator = Simulator()
                    simulator.set(sms=2, race=1)
                    torch.save(case.run(), prefix + ".pt")
                    return simulator.warnings()

                warned = in_child({}, dump)
                assert warned == "", warned
                text = Path(prefix + ".0.ptx").read_text()
                modules[kernel, bits] = case, text, torch.load(prefix + ".pt")
            case, ptx, expected = modules[kernel, bits]
            changed = Path(folder, "mutant.ptx")
            changed.write_text(in_kernel(mutate, *name_parts(kernel, bits))(ptx))
            env = {"PTXSIM_OVERRIDE_PTX": str(changed)}

            def notice(case: Case = case, expected: torch.Tensor = expected, env=env) -> str:
                return how_noticed(case, expected, env)

            result[name] = in_child({}, notice) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
