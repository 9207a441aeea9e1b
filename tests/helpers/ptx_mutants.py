"""Breaks the PTX of compiled kernels in one place at a time and asks whether the simulator notices.

A script of tests/cuda holds a table of mutants, ``{name: (*key, mutation)}``, and a function that
makes a ``Case`` of a key; ``main`` runs them and prints {mutant: how it was noticed, or null} as
JSON. Names of mutants on the command line choose some of them. ``noticed_mutants`` of
tests/helpers/simulator.py runs a script.

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.helpers.simulator import use_simulator

Mutation = Callable[[str], str]

# What the kernels for sm_90a have in common. The order of barrier waits in the text of a ping-pong
# kernel is turn, full, empty; in a cooperative one full, empty.
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\], %r\d+, %r\d+;"
PASS = "setp.eq.u32 P1, 0, 0;"
EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )(%r\d+);"
INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+);"
LOAD_A = r"(cp\.async\.bulk\.tensor\.2d[^;]*?\{)(%r\d+)(, %r\d+\}[^;]*;)"
LOAD_B = r"(cp\.async\.bulk\.tensor\.3d\.shared[^;]*?\{%r\d+, %r\d+, )(%r\d+)(\}[^;]*;)"
# Results that are stored through boxes: column and the two coordinates of rows.
STORE = r"(cp\.async\.bulk\.tensor\.3d\.global[^;]*?\{)(%r\d+)(, )(%r\d+)(, )(%r\d+)(\}[^;]*;)"
FENCE = r"fence\.proxy\.async\.shared::cta;"


def boxes_read(count: int) -> str:
    """PTX pattern: the wait until no more than so many boxes are still to be read."""
    return rf"cp\.async\.bulk\.wait_group\.read {count};"


# (seed, async_delay)
SCHEDULES = [(seed, delay) for delay in (40, 1, 400, 20000) for seed in (1, 2)]
OPTIONS = {"sms": 2, "race": 1}
LIMITS = {"livelock_insts": 3_000_000, "max_insts": 40_000_000}


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


def added(register: str, amount: int) -> str:
    """PTX operand pattern: `register` plus an amount, in a block of its own."""
    return f"{{ .reg .b32 q; add.s32 q, {register}, {amount}; "


def in_kernel(mutate: Mutation, parts: Iterable[str]) -> Mutation:
    """Only in the first kernel of the module whose name has all parts."""

    def mutate_kernel(ptx: str) -> str:
        starts = [m.start() for m in re.finditer(r"\.entry", ptx)] + [len(ptx)]
        for begin, end in itertools.pairwise(starts):
            name = ptx[begin : ptx.index("(", begin)]
            if all(part in name for part in parts):
                return ptx[:begin] + mutate(ptx[begin:end]) + ptx[end:]
        raise LookupError(f"no kernel with {parts} in its name")

    return mutate_kernel


@dataclass
class Case:
    """A call whose first kernel is broken, with inputs that reach what its mutants break."""

    run: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    kernel: tuple[str, ...]  # what the kernel's name has in it: a module may hold many
    # Launches what the call launches from other modules: the next one that is loaded is replaced.
    prepare: Callable[[], object] = lambda: None
    env: dict[str, str] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)  # of the simulator, beside main's

    def output(self) -> torch.Tensor:
        """Everything that comes out, as bytes."""
        out = self.run()
        tensors = out if isinstance(out, tuple) else (out,)
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])


def main(
    mutants: Mapping[str, tuple[Any, ...]],
    make_case: Callable[..., Case],
    *,
    options: Mapping[str, int] = OPTIONS,
    schedules: Iterable[tuple[int, int]] = SCHEDULES,
) -> None:
    """Runs the mutants that the command line names, or all; ``make_case(*key)`` is called once a
    key, with the same seed."""
    torch.set_num_threads(1)  # threads do not survive a fork
    use_simulator()
    only = sys.argv[1:]
    result: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        sound: dict[tuple[Any, ...], tuple[Case, str, torch.Tensor]] = {}
        for name, (*parts, mutate) in mutants.items():
            if only and name not in only:
                continue
            key = tuple(parts)
            if key not in sound:
                torch.manual_seed(5)
                case = make_case(*key)
                sound[key] = case, *_sound_run(case, f"{folder}/{len(sound)}", options)
            case, ptx, expected = sound[key]
            changed = Path(folder, "mutant.ptx")
            changed.write_text(in_kernel(mutate, case.kernel)(ptx))
            notice = partial(_how_noticed, case, expected, str(changed), options, schedules)
            result[name] = _in_child(notice) or None
    json.dump(result, sys.stdout, indent=1)


def _sound_run(case: Case, prefix: str, options: Mapping[str, int]) -> tuple[str, torch.Tensor]:
    """The text of the case's module and what the sound kernel gives."""

    def dump() -> str:
        simulator = _begin(case, options, PTXSIM_DUMP_PTX=prefix)
        torch.save(case.output(), prefix + ".pt")
        return simulator.warnings()

    warned = _in_child(dump)
    assert warned == "", warned
    return Path(prefix + ".0.ptx").read_text(), torch.load(prefix + ".pt")


def _how_noticed(
    case: Case,
    expected: torch.Tensor,
    ptx: str,
    options: Mapping[str, int],
    schedules: Iterable[tuple[int, int]],
) -> str:
    simulator = _begin(case, {**options, **LIMITS}, PTXSIM_OVERRIDE_PTX=ptx)
    for seed, delay in schedules:
        simulator.set(seed=seed, async_delay=delay)
        try:
            out = case.output()
        except RuntimeError as error:
            return f"error: {str(error)[:200]}"
        warnings = simulator.warnings()
        if warnings:
            return f"warning: {warnings[:200]}"
        if not torch.equal(out, expected):
            return "other bits"
    return ""


def _begin(case: Case, options: Mapping[str, int], **env: str) -> _Simulator:
    os.environ.update(case.env)
    case.prepare()
    os.environ.update(env)
    simulator = _Simulator()
    simulator.set(**{**options, **case.options})
    return simulator


class _Simulator:
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


def _in_child(work: Callable[[], str]) -> str:
    """Returns what work() returns in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
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
