"""Fixtures that tests of the CUDA kernels need beside values: schedules, counters and warnings of
the simulator that runs them (docs/cuda-without-a-gpu.md)."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator

import pytest
import torch

# Of asynchronous copies and products, in turns of a warp.
DELAYS = (1, 40, 400, 20000)
DEFAULTS = {"seed": 1, "async_delay": 40, "race": 0, "check_uninit": 0, "sms": 16, "verbose": 0}


class Simulator:
    """The C interface of the simulator behind libcudart.so.13."""

    def __init__(self, seeds: int) -> None:
        self._schedules = [(seed, delay) for seed in range(1, seeds + 1) for delay in DELAYS]
        self._lib = ctypes.CDLL("libcudart.so.13")
        self._lib.ptxsim_set_option.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self._lib.ptxsim_stat.argtypes = [ctypes.c_char_p]
        self._lib.ptxsim_stat.restype = ctypes.c_ulonglong
        self._lib.ptxsim_warnings.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]

    @contextlib.contextmanager
    def options(self, **values: int) -> Iterator[None]:
        """Sets options (seed, async_delay, race, check_uninit, sms ...) for the block."""
        for name, value in values.items():
            assert self._lib.ptxsim_set_option(name.encode(), value) == 0, name
        try:
            yield
        finally:
            for name in values:
                if name in DEFAULTS:
                    self._lib.ptxsim_set_option(name.encode(), DEFAULTS[name])

    def stat(self, name: str) -> int:
        """A counter since the start: insts, wgmma, tma, turns, ld_bytes, st_bytes, tma_ld_bytes,
        tma_st_bytes."""
        return int(self._lib.ptxsim_stat(name.encode()))

    def counted(self, call: Callable[[], object], *names: str) -> dict[str, int]:
        """Returns what a call adds to counters."""
        before = {name: self.stat(name) for name in names}
        call()
        return {name: self.stat(name) - before[name] for name in names}

    def launched(self, call: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> list[str]:
        """The kernels that a call launches, by the first 100 characters of their mangled names."""
        capfd.readouterr()
        with self.options(verbose=1):
            call()
        lines = capfd.readouterr().err.splitlines()
        return [line.split()[1] for line in lines if re.match(r"ptxsim: \S+ grid \(", line)]

    def warnings(self) -> str:
        """The warnings since the last time (races, missing fences), one per line; clears them."""
        buffer = ctypes.create_string_buffer(1 << 16)
        self._lib.ptxsim_warnings(buffer, len(buffer), 1)
        return buffer.value.decode()

    def check_schedules(self, call: Callable[[], object]) -> None:
        """Runs `call`, which returns a tensor or a tuple of them, under every schedule: the bits
        are the same, the race detector is silent, nothing that was never written is read."""
        self.warnings()
        with self.options(race=1, check_uninit=1):
            expected = _tensors(call())
        assert self.warnings() == ""
        for seed, delay in self._schedules:
            with self.options(seed=seed, async_delay=delay):
                for got, want in zip(_tensors(call()), expected, strict=True):
                    assert _same_bits(got, want), f"seed {seed}, delay {delay}: other bits"
        assert self.warnings() == ""


def _tensors(result: object) -> list[torch.Tensor]:
    items = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in items if isinstance(t, torch.Tensor)]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "sim":
        return
    skip = pytest.mark.skip(
        reason="Looks into the simulator of CUDA kernels: run by `make test-sim`."
    )
    here = config.rootpath / "tests" / "cuda"
    for item in items:
        # What the host decides before a launch is asked without a simulator and without a card.
        if item.path.is_relative_to(here) and not item.path.is_relative_to(here / "host"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def simulator(request: pytest.FixtureRequest) -> Simulator:
    return Simulator(seeds=5 if request.config.getoption("--full") else 2)
