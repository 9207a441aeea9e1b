from __future__ import annotations

import contextlib
import gc
import os
import signal
from typing import Any

import pytest
import torch
from tests.helpers.simulator import use_simulator

from moe_ops.testing import seed_from

# Processes that inductor starts to compile in cost more than they compile here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

MARKERS = (
    "full: more of what other tests show (seeds, sizes, instruction sets), run only with --full",
    "cpu_only: about threads, instruction sets, packed copies or the checking of values, which a "
    "device op cannot do without waiting; not run with --backend sim or cuda",
    "slow_on_simulator: run with --backend sim only with --full, and not by make test-cuda-torch",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the cases marked `full`")
    parser.addoption(
        "--backend",
        choices=("cpu", "sim", "cuda"),
        default="cpu",
        help="what the ops run on: CPU kernels, CUDA kernels on the simulator (a build with "
        "MOE_OPS_CUDART=shared; docs/cuda-without-a-gpu.md), or CUDA kernels on a card",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # A shell starts background jobs with SIGINT ignored, and processes inherit that: tests of
    # interrupted runs would wait for nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    backend = config.getoption("--backend")
    if backend == "sim":
        try:
            use_simulator()
        except RuntimeError as error:
            pytest.exit(str(error), returncode=1)
    elif backend == "cuda":
        if not torch.cuda.is_available():
            pytest.exit("--backend cuda: torch sees no CUDA device.", returncode=1)
        torch.set_default_device("cuda")


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests of a file, which share fixtures of the module; and all tests of
    tests/parallel, which share a pool of processes. On a simulator tests share nothing that takes
    long, and some files take minutes."""
    if config.getoption("--backend") != "cpu":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/parallel" if file.startswith("tests/parallel/") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, backend = config.getoption("--full"), config.getoption("--backend")
    left_out = set() if full else {"full"}
    if backend != "cpu":
        left_out.add("cpu_only")
    spares_time = backend == "sim" and not full
    if spares_time:
        left_out.add("slow_on_simulator")
    kept = [item for item in items if not left_out & set(item.keywords)]
    if spares_time:
        kept = without_repeated_twins(kept)
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def without_repeated_twins(items: list[pytest.Item]) -> list[pytest.Item]:
    """Leaves out cases in float64 and float16, except for the first of each test. The CUDA kernels
    of these types are the text of those of float32 and bfloat16."""
    seen, kept = set(), []
    for item in items:
        callspec = getattr(item, "callspec", None)
        dtype = callspec and callspec.params.get("dtype")
        test = (item.nodeid.partition("[")[0], dtype)
        if dtype not in (torch.float64, torch.float16) or test not in seen:
            kept.append(item)
        seen.add(test)
    return kept


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """The collector passes over what lives already, such as imported modules and the list of tests:
    with them gc.collect() takes more than a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch from the test's own name."""
    value = seed_from(request.node.nodeid)
    torch.manual_seed(value)
    return value


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """cpu, sim or cuda."""
    return request.config.getoption("--backend")


@pytest.fixture
def device(backend: str) -> torch.device:
    """Returns the device on which a device-agnostic test runs."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture
def set_threads():
    """A function that sets torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def bad_input():
    """A context that expects one sentence: the op, the tensor or argument, what came."""
    return expect_bad_input


@contextlib.contextmanager
def expect_bad_input(op: str, name: str, *words: str):
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    assert name in message, message
    assert ", got " in message, message
    got = message.split(", got ")[-1]
    for word in words:
        assert word in got, f"{word!r} is not in what the message says came: {message}"


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest):
    """Compiled lambdas of one test must not count against the recompile limit of the next."""
    yield
    if "compile" in request.node.name:
        torch.compiler.reset()
