"""Breaks the PTX of the sm_90a grouped GEMMs in one place at a time and asks whether the simulator
notices. Run by test_grouped_gemm_sm90.py; prints {mutant: how it was noticed, or null} as JSON.

Each mutant runs in a process of its own, forked before anything was launched: the simulator
replaces the first module that a process loads."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tests.helpers.simulator import use_simulator

import moe_ops

SCHEDULES = [(seed, delay) for delay in (40, 1, 400, 20000) for seed in (1, 2)]
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\], %r\d+, %r\d+;"
PASS = "setp.eq.u32 P1, 0, 0;"

Mutation = Callable[[str], str]


def sub(pattern: str, replacement: str, nth: int | None = None) -> Mutation:
    """All matches, or the nth (from the end if negative); a space stands for any white space. No
    match is an error."""
    pattern = pattern.replace(" ", r"\s+")

    def mutate(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.S))
        if not found or (nth is not None and not -len(found) <= nth < len(found)):
            raise LookupError(f"{pattern!r} ({nth}) is not in the kernel: {len(found)} matches")
        for match in reversed(found if nth is None else [found[nth]]):
            ptx = ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
        return ptx

    return mutate


def wait_before(pattern: str) -> Mutation:
    """The barrier wait just before the first match always passes."""

    def mutate(ptx: str) -> str:
        end = re.search(pattern, ptx).start()
        last = list(re.finditer(TRY_WAIT, ptx[:end]))[-1]
        return ptx[: last.start()] + PASS + ptx[last.end() :]

    return mutate


def in_kernel(mutate: Mutation, *parts: str) -> Mutation:
    """Only in the first kernel of the module whose name has all parts."""

    def mutate_kernel(ptx: str) -> str:
        starts = [m.start() for m in re.finditer(r"\.entry", ptx)] + [len(ptx)]
        for begin, end in itertools.pairwise(starts):
            name = ptx[begin : ptx.index("(", begin)]
            if all(part in name for part in parts):
                return ptx[:begin] + mutate(ptx[begin:end]) + ptx[end:]
        raise LookupError(f"no kernel with {parts} in its name")

    return mutate_kernel


def added(register: str, amount: int) -> str:
    """PTX operand pattern: `register` plus an amount, in a block of its own."""
    return f"{{ .reg .b32 q; add.s32 q, {register}, {amount}; "


EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )(%r\d+);"
INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+);"
LOAD_A = r"(cp\.async\.bulk\.tensor\.2d[^;]*?\{)(%r\d+)(, %r\d+\}[^;]*;)"
LOAD_B = r"(cp\.async\.bulk\.tensor\.3d[^;]*?\{%r\d+, %r\d+, )(%r\d+)(\}[^;]*;)"

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
    "lone row tile: B sent to both blocks": ("nt", "128x256", sub(MASK, r"mov.b16 \1, 3;")),
    "lone row tile: half of B not loaded": (
        "nn",
        "128x256",
        sub(NOT_LOADED, r"\1and.pred \3, \4, \4;"),
    ),
    # The order of a cooperative kernel: products, warpgroup without rows, producer.
    "warpgroup without rows: full wait dropped": ("nt", "128x256", sub(TRY_WAIT, PASS, 1)),
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
    torch.manual_seed(5)
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


class Simulator:
    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcudart.so.13")
        self._lib.ptxsim_set_option.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self._lib.ptxsim_warnings.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]

    def set(self, **options: int) -> None:
        for name, value in options.items():
            assert self._lib.ptxsim_set_option(name.encode(), value) == 0, name

    def warnings(self) -> str:
        buffer = ctypes.create_string_buffer(1 << 14)
        self._lib.ptxsim_warnings(buffer, len(buffer), 1)
        return buffer.value.decode()


def in_child(env: dict[str, str], work: Callable[[], str]) -> str:
    """What work() returns in a forked process with `env`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.environ.update(env)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the simulator prints its reports
            os.write(write, work().encode())
            status = 0
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"a child ended with {status}")
    return answer


def name_parts(product: str, tile: str) -> tuple[str, str]:
    """Of the kernel's name: its template arguments, as the enums of csrc/cuda/grouped_gemm/config.h
    number them. A module holds all kernels of a kind of product."""
    products, tiles = ("nt", "nn", "tn"), ("128x256", "128x128", "64x128", "64x64")
    return f"ProductE{products.index(product)}E", f"TileShapeE{tiles.index(tile)}E"


def run(product: str, call: dict[str, torch.Tensor]) -> torch.Tensor:
    return (moe_ops.grouped_gemm_wgrad if product == "tn" else moe_ops.grouped_gemm)(**call)


def how_noticed(product: str, call: dict[str, torch.Tensor], expected: torch.Tensor) -> str:
    simulator = Simulator()
    simulator.set(sms=2, livelock_insts=3_000_000, max_insts=20_000_000, race=1)
    for seed, delay in SCHEDULES:
        simulator.set(seed=seed, async_delay=delay)
        try:
            out = run(product, call)
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
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        kernels: dict[tuple[str, str], tuple[str, dict[str, torch.Tensor], torch.Tensor]] = {}
        for name, (product, tile, mutate) in MUTANTS.items():
            if only and name not in only:
                continue
            os.environ["MOE_OPS_GEMM_TILE"] = tile
            if (product, tile) not in kernels:
                prefix = f"{folder}/{product}_{tile}"
                call = operands(product)

                def dump(product=product, call=call, prefix=prefix) -> str:
                    simulator = Simulator()
                    simulator.set(sms=2, race=1)
                    torch.save(run(product, call), prefix + ".pt")
                    return simulator.warnings()

                warned = in_child({"PTXSIM_DUMP_PTX": prefix}, dump)
                assert warned == "", warned
                kernels[product, tile] = (
                    Path(prefix + ".0.ptx").read_text(),
                    call,
                    torch.load(prefix + ".pt"),
                )
            ptx, call, expected = kernels[product, tile]
            changed = Path(folder, "mutant.ptx")
            changed.write_text(in_kernel(mutate, *name_parts(product, tile))(ptx))

            def notice(product=product, call=call, expected=expected) -> str:
                return how_noticed(product, call, expected)

            result[name] = in_child({"PTXSIM_OVERRIDE_PTX": str(changed)}, notice) or None
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
