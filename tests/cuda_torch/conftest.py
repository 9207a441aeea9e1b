"""What only a CUDA build of torch can show: streams, graphs, devices, threads of autograd. Run by
``make test-cuda-torch`` on the simulator, or on a card with ``--backend cuda``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "cuda":
        return
    skip = pytest.mark.skip(reason="Needs CUDA tensors: run by `make test-cuda-torch`.")
    here = config.rootpath / "tests" / "cuda_torch"
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(skip)
