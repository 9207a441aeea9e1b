"""Memory stays what it is, however often an op is called.

A process of its own calls every registered op with the arguments that the public functions give it,
forward and backward, and every public function with its backward. It prints by how much memory
grew: what malloc has handed out, which shows a leak that fits between freed blocks, Python's
objects, and resident memory. What grows once (a cache, an arena) does not grow again: of some
attempts the smallest counts. A leak of torch's strings was 48 bytes per call.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops import layers

from .every_op import CASES, OPS, Sizes

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm"),
]

ATTEMPTS = 4
# Calls of an op, steps of a public function, bytes per call.
SHORT = (2_500, 1_000, 16.0)
FULL = (100_000, 100_000, 1.0)


def registered() -> list[str]:
    names = {s.name for s in torch._C._jit_get_all_schemas()}
    return sorted(n.removeprefix("moe_ops::") for n in names if n.startswith("moe_ops::"))


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks".split()
    ] + [("keepcost", ctypes.c_size_t)]


def used() -> tuple[int, int, int]:
    """Bytes of malloc where glibc tells, of Python's objects at least, and resident ones."""
    allocated = 0
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = MallInfo
        info = mallinfo()
        allocated = info.uordblks + info.hblkhd
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return allocated, 16 * sys.getallocatedblocks(), pages * os.sysconf("SC_PAGESIZE")


def growth(call, calls: int, most: float) -> float:
    """Bytes a call; the smallest of the attempts, which end with the first one below `most`."""
    smallest = float("inf")
    for _ in range(calls // 10):
        call()
    for _ in range(ATTEMPTS):
        gc.collect()
        before = used()
        for _ in range(calls):
            call()
        gc.collect()
        grown = max(b - a for a, b in zip(before, used(), strict=True))
        smallest = min(smallest, grown / calls)
        if smallest <= most:
            break
    return smallest


class Record(TorchDispatchMode):
    """The arguments with which each op is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "moe_ops":
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.setdefault(func._opname, (func, copies, kwargs))
        return func(*args, **kwargs)


def floats(y) -> list[Tensor]:
    outputs = y if isinstance(y, tuple) else (y,)
    return [t for t in outputs if t.requires_grad]


def step_of(op: str, call: dict, **options):
    """A call of the public function, and its backward where it has one."""
    call = dict(call)
    function, leaves = getattr(moe_ops, op), []
    for name, t in call.items():
        if isinstance(t, Tensor) and t.dtype == torch.float32:
            call[name] = t.clone().requires_grad_()
            leaves.append(call[name])
    try:
        has_backward = bool(floats(function(**call)))
    except NotImplementedError:  # an op of inference
        has_backward = False

    def step() -> None:
        if not has_backward:
            with torch.no_grad():
                function(**call)
            return
        outputs = floats(function(**call, **options))
        torch.autograd.grad(outputs, leaves, [t.detach() for t in outputs], allow_unused=True)

    return step


def refused() -> None:
    with contextlib.suppress(ValueError):
        moe_ops.topk_router(torch.zeros(1, 2), 1, score_func="tanh")


def report(calls: int, steps: int, most: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = Sizes(random.Random(0))
    sizes.dtype = torch.float32
    cases = {op: CASES[op].call(sizes) for op in OPS}
    with Record() as record:
        for op, call in cases.items():
            getattr(moe_ops, op)(**call)
            step_of(op, call)()
        ffn = cases["moe_ffn"]
        buffers = (torch.zeros_like(ffn["w_gate_up"]), torch.zeros_like(ffn["w_down"]))
        step_of("moe_ffn", ffn, main_grads=buffers)()
        quantized = cases["moe_ffn_quantized"]
        leaf = quantized["x"].detach().clone().requires_grad_()
        moe_ops.moe_ffn_quantized(**{**quantized, "x": leaf}).sum().backward()
        layers.ExpertLoRA(layers.Experts(4, 16, 8), 2)(
            torch.randn(3, 16), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int32)
        ).sum().backward()
        wgrad = cases["grouped_gemm_fp8_wgrad"]
        moe_ops.grouped_gemm_fp8_wgrad(**wgrad, main_grad=moe_ops.grouped_gemm_fp8_wgrad(**wgrad))

    gc.freeze()  # Or each collection goes through all of torch.

    def tell(kind: str, name: str, call, count: int) -> None:
        print(json.dumps([kind, name, growth(call, count, most)]), flush=True)

    for name, (func, args, kwargs) in sorted(record.calls.items()):
        with torch.no_grad():
            tell("op", name, lambda f=func, a=args, k=kwargs: f(*a, **k), calls)
    for op in OPS:
        tell("step", op, step_of(op, cases[op]), steps)
    tell("step", "refused", refused, steps)


@pytest.fixture(scope="module")
def grown(request) -> dict:
    amounts = FULL if request.config.getoption("--full") else SHORT
    run = subprocess.run(
        [sys.executable, "-m", "tests.contract.test_leaks", *map(str, amounts)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert run.returncode == 0, run.stderr
    return {(kind, name): n for kind, name, n in map(json.loads, run.stdout.splitlines())}


def most_of(request) -> float:
    return FULL[2] if request.config.getoption("--full") else SHORT[2]


@pytest.mark.parametrize("op", registered())
def test_registered_op(op, grown, request):
    assert ("op", op) in grown, "no public function calls it here: report() needs a case for it"
    assert grown["op", op] <= most_of(request), "bytes a call"


@pytest.mark.parametrize("op", [*moe_ops.ops.__all__, "refused"])
def test_step(op, grown, request):
    assert grown["step", op] <= most_of(request), "bytes a step"


if __name__ == "__main__":
    report(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
