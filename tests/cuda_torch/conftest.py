"""Tests of what only a CUDA build of torch can show: streams, graphs, devices, threads of autograd.
Run by ``make test-cuda-torch`` on the simulator, or on a card with ``--backend cuda``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "cuda":
        return
    skip = pytest.mark.skip(reason="Needs CUDA tensors: run by `make test-cuda-torch`.")
    here = config.rootpath / "tests" / "cuda_torch"
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(skip)


@pytest.fixture
def verbose() -> Iterator[None]:
    """The simulator prints a line a launch."""
    try:
        set_option = ctypes.CDLL("libcudart.so.13").ptxsim_set_option
    except (OSError, AttributeError):
        pytest.skip("Launches are seen on the simulator.")
    set_option.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
    set_option(b"verbose", 1)
    yield
    set_option(b"verbose", 0)
