from __future__ import annotations

import importlib.util

import pytest

# Checkpoints of the zoo need safetensors; without it there is nothing to collect.
collect_ignore_glob = [] if importlib.util.find_spec("safetensors") else ["*test_*.py"]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Models here are so small that a second thread only gets in the way."""
    set_threads(1)
