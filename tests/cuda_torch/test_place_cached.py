"""Experts cached on CUDA: memory, waits, copies. tests/hf/test_place_cached.py has the values."""

from __future__ import annotations

import gc

import pytest
import torch
from tests.hf.models import build, tokens

import moe_ops.hf

N = 8


def cached(**options):
    with torch.device("cpu"):
        model = build("qwen3_moe", **options)
        moe_ops.hf.place(model, "cuda", cached_experts=N)
    return model


def test_memory_is_the_dense_weights_and_the_slots():
    """The peak of a decoding call, to 5 %."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = cached(moe_intermediate_size=2048, num_experts=32)
    banks = [layer.mlp.experts for layer in model.model.layers]
    slots = sum(p.nbytes for bank in banks for p in bank.parameters()) * N // 32
    dense = sum(p.nbytes for p in (*model.parameters(), *model.buffers()) if p.is_cuda)
    ids = tokens()[:1, :1].cuda()
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    assert all(bank.expert_cache.hits > 0 for bank in banks)
    peak = torch.cuda.max_memory_allocated() - before
    assert dense + slots <= peak <= 1.05 * (dense + slots)
    caches = [bank.expert_cache for bank in banks]
    moe_ops.hf.unplace(model, "cpu")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < slots / 2 and not caches[0].experts


def test_copies_are_asynchronous_and_the_host_waits_once_per_layer(monkeypatch):
    model = cached(hidden_size=256, moe_intermediate_size=256)
    ids = tokens()[:1, :1].cuda()
    with torch.no_grad():
        model(ids)  # Locks memory.
    waits, copied = [], []
    wait, copy = torch.cuda.Event.synchronize, torch.Tensor.copy_

    def watched(target, source, **options):
        if target.is_cuda and not source.is_cuda:
            side = torch.cuda.current_stream() != torch.cuda.default_stream()
            copied.append((source.is_pinned(), options["non_blocking"], side))
        return copy(target, source, **options)

    def refused(*args, **kwargs):
        raise AssertionError("a wait for the device")

    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda e: (waits.append(e), wait(e))[1])
    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    for owner in (torch.cuda, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", refused)
    with torch.no_grad():
        model(tokens()[:1, 1:2].cuda())
    assert len(waits) == len(model.model.layers)
    assert copied and set(copied) == {(True, True, True)}


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_slots_follow_the_model():
    model, ids = cached(), tokens()
    with torch.no_grad():
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            model.to(device)
            found = [model(ids.to(device)).logits.cpu() for _ in range(2)]
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
            assert all(layer.mlp.experts.expert_cache.hits > 0 for layer in model.model.layers)
