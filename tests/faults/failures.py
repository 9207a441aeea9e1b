"""Fails each allocation of a call in turn: python -m tests.faults.failures, with failing.cpp
preloaded. Prints a line of JSON for each call: how many allocations it makes, and what went wrong.

After a failure the same call is made again, in the same thread, and must give bitwise identical
results. Each try has a thread of its own, because a thread keeps its scratch memory: in a used one
there is nothing left to allocate.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from tests.helpers.quantized import weight_config

import moe_ops
from moe_ops import layers
from moe_ops.testing import assert_identical

from ..contract.every_op import OPS, backward_of, forward_of, operands_of

Fn = Callable[[], list[torch.Tensor]]

failing = ctypes.CDLL(None)
failing.failing_arm.argtypes = [ctypes.c_long]
failing.failing_disarm.restype = failing.failing_mapped.restype = ctypes.c_long


class MallocInfo(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


failing.mallinfo2.restype = MallocInfo


def bytes_in_use() -> int:
    gc.collect()
    info = failing.mallinfo2()
    return info.uordblks + info.hblkhd + failing.failing_mapped()


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Fn]]:
    for op in OPS:
        call = operands_of(op, dtype)
        yield op, forward_of(op, call)
        run = backward_of(op, call)
        if run is not None:
            yield f"{op}, backward", run
    x, ids, weights = torch.randn(6, 64), torch.randint(4, (6, 2)), torch.rand(6, 2)
    for form in (None, "int4"):
        torch.manual_seed(1)
        experts = layers.Experts(4, 64, 64)
        if form is not None:
            experts = moe_ops.quantize(experts, weight_config(form))

        def pack_weights(experts=experts) -> list[torch.Tensor]:
            moe_ops.unpack_weights(experts)
            moe_ops.pack_weights(experts)
            with torch.no_grad():
                return [experts(x, weights, ids)]

        yield f"pack_weights of {type(experts).__name__}", pack_weights
    for form in ("int8", "int4"):
        torch.manual_seed(1)
        plain = layers.Experts(4, 64, 64)

        def quantize(plain=plain, form=form) -> list[torch.Tensor]:
            made = moe_ops.quantize(plain, weight_config(form))
            return [t for t in made.state_dict().values() if isinstance(t, torch.Tensor)]

        yield f"quantize, {form}", quantize
    # Outputs from 8 MiB on come from the cache of buffers.
    large = torch.randn(2200, 2048)

    def large_output() -> list[torch.Tensor]:
        out = moe_ops.gated_act(large, "swiglu")
        return [out[:3].clone()]

    yield "gated_act, 9 MiB", large_output


class Attempt:
    """The outcome of a call whose n-th allocation failed, and of the same call after it."""

    def __init__(self, run: Fn, nth: int) -> None:
        self.error: BaseException | None = None
        self.first: list[torch.Tensor] = []
        self.again: list[torch.Tensor] = []
        self.again_error: BaseException | None = None

        def both() -> None:
            failing.failing_arm(nth)
            try:
                self.first = run()
            except Exception as error:
                self.error = error.with_traceback(None)
            self.seen = failing.failing_disarm()
            try:
                self.again = run()
            except Exception as error:
                self.again_error = error

        thread = threading.Thread(target=both)
        thread.start()
        thread.join()


def faults_of(run: Fn, calls: int) -> tuple[int, int, list[str]]:
    """Allocations, those of them whose failure the call survived, and faults. With `calls`, each
    failure is repeated in three times that many calls, and bytes that stay are a fault."""
    expected = run()
    faults, survived, nth = [], 0, 0
    # A call that succeeds may leak, too; that is for other tests.
    usual = bytes_a_call(run, 0, calls)
    while True:
        nth += 1
        attempt = Attempt(run, nth)
        fired = attempt.seen >= nth
        what = f"allocation {nth}"
        if attempt.again_error is not None:
            faults.append(f"{what}: the next call failed: {attempt.again_error}")
        elif not all(same(a, b) for a, b in zip(attempt.again, expected, strict=True)):
            faults.append(f"{what}: the next call gave something else")
        if attempt.error is None:
            survived += fired
            if not all(same(a, b) for a, b in zip(attempt.first, expected, strict=True)):
                faults.append(f"{what}: no exception, and a wrong result")
        elif not isinstance(attempt.error, (MemoryError, RuntimeError)) or (
            "memory" not in str(attempt.error)
        ):
            faults.append(f"{what}: {type(attempt.error).__name__}: {attempt.error}")
        if not fired:
            return nth - 1, survived, faults
        leaked = bytes_a_call(run, nth, calls) - usual
        if leaked >= 8:  # the least that malloc hands out is 24
            faults.append(f"{what}: {leaked:.0f} bytes stay of each failed call")


def bytes_a_call(run: Fn, nth: int, calls: int) -> float:
    """Bytes that stay of a call whose n-th allocation fails. The least of three measurements: now
    and then a cache or a table of Python grows."""
    if calls == 0:
        return 0.0
    before, least = bytes_in_use(), float("inf")
    for _ in range(3):
        for _ in range(calls):
            Attempt(run, nth)
        after = bytes_in_use()
        least, before = min(least, (after - before) / calls), after
    return max(least, 0.0)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        assert_identical(a, b)
    except AssertionError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    if not failing.failing_find():
        sys.exit("libmoe_ops.so or libc10.so was not found in this process")
    # torch's C++ writes a line to stderr for each failed allocation; what Python says stays.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    gc.collect()
    gc.freeze()  # what is imported by now is not looked at again and again
    every = arguments.full
    dtypes = (torch.bfloat16, torch.float32, torch.float64) if every else (torch.bfloat16,)
    for threads in (1, 2) if every else (2,):
        torch.set_num_threads(threads)
        for dtype in dtypes:
            for name, run in calls(dtype):
                looks_for_leaks = every and threads == 1 and dtype == torch.bfloat16
                count, survived, faults = faults_of(run, 10 if looks_for_leaks else 0)
                line = {
                    "call": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "allocations": count,
                    "survived": survived,
                    "faults": faults,
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
