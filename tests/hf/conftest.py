from __future__ import annotations

import importlib.util

import pytest
import torch

# The folder needs the `hf` extra; without it there is nothing to collect.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture
def dense():
    """The device of the backend, a GPU or the CPU."""
    return torch.get_default_device().type
