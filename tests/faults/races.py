"""Calls of every op from several threads at once, for ThreadSanitizer.

python -m tests.faults.races [DTYPE ...]
Needs the build of `make test-tsan`, in which a call's own threads are seen by it. Results are
compared, too: threads that share memory by mistake may be ordered by luck.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch

import moe_ops
from moe_ops import memory
from moe_ops.testing import assert_identical

from ..contract.every_op import OPS, backward_of, forward_of, operands_of

CALLERS = 3


def at_once(functions: list[Callable[[], object]]) -> None:
    """Runs all of them, each in a thread of its own, and raises what one of them raised."""
    start = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def first_calls() -> None:
    """All threads ask at once for what is decided once, the instruction set among it."""
    logits = torch.randn(40, 8)
    at_once([lambda: moe_ops.topk_router(logits, 2)] * 8)


def large_outputs() -> None:
    """Blocks of the cache of large buffers go from thread to thread."""
    x = torch.randn(2200, 2048)
    expected = moe_ops.gated_act(x, "swiglu")

    def make() -> None:
        for _ in range(4):
            assert_identical(moe_ops.gated_act(x, "swiglu"), expected)

    def give_back() -> None:
        for _ in range(8):
            memory.empty_cache()
            memory.cached_bytes()

    at_once([make] * CALLERS + [give_back])


def own_copies(op: str, call: dict) -> dict:
    """The call with copies of the operands that the op writes, which callers may not share."""
    schema = getattr(torch.ops.moe_ops, op).default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    return {name: value.clone() if name in written else value for name, value in call.items()}


def every_op(dtype: torch.dtype) -> int:
    count = 0
    for op in OPS:
        call = operands_of(op, dtype)
        check_at_once([forward_of(op, own_copies(op, call)) for _ in range(CALLERS)])
        count += 1
        # Each caller has its own graph; operands and gradients are the same.
        backwards = [backward_of(op, call) for _ in range(CALLERS)]
        if all(backwards):
            check_at_once(backwards)
            count += 1
    return count


def check_at_once(runs: list[Callable[[], list[torch.Tensor]]]) -> None:
    expected = runs[0]()

    def check(run: Callable[[], list[torch.Tensor]]) -> None:
        for a, b in zip(run(), expected, strict=True):
            assert_identical(a, b)

    at_once([lambda run=run: check(run) for run in runs])


def main() -> None:
    torch.set_num_threads(1)  # torch's own threads are not watched
    first_calls()
    large_outputs()
    dtypes = [getattr(torch, name) for name in sys.argv[1:]] or [torch.float32, torch.bfloat16]
    count = sum(every_op(dtype) for dtype in dtypes)
    print(f"{count} calls from {CALLERS} threads at once")


if __name__ == "__main__":
    main()
