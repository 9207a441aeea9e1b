from __future__ import annotations

import gc

import pytest

import moe_ops
from moe_ops.expert_weights import packing


@pytest.fixture(autouse=True)
def off():
    """Tests begin with nothing packed and banks that pack when they are told to."""
    gc.collect()
    with moe_ops.set_packing_policy("off"):
        yield


@pytest.fixture
def counted(monkeypatch):
    """Returns how often each op ran."""
    calls = {"moe_ffn": 0, "moe_ffn_packed": 0, "pack_experts": 0}

    def watch(name):
        function = getattr(packing, name)

        def spy(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(packing, name, spy)

    for name in calls:
        watch(name)
    return calls
