"""Experts on the CPU with some of them in slots on the GPU, against models without slots."""

from __future__ import annotations

import copy

import pytest
import torch

import moe_ops
import moe_ops.hf
from moe_ops.hf.experts import cached

from . import published_checkpoints
from .models import MODEL_TYPES, build, loss_and_gradients, tokens
from .placed_models import SIZES, experts_of, generate

CALLED = [t for t in MODEL_TYPES if t not in ("jetmoe", "llama4_text")]


def cached_pair(model_type, dense, num_slots, quantization=None, **options):
    """Returns a placed model without and one with a cache."""
    want, got = build(model_type, **options).cpu(), build(model_type, **options).cpu()
    moe_ops.hf.place(want, dense, quantization=quantization)
    moe_ops.hf.place(got, dense, quantization=quantization, cached_experts=num_slots)
    return want, got


def caches_of(model):
    return [bank.expert_cache for bank in experts_of(model)]


@pytest.mark.parametrize("num_slots", [1, 3, 100])
@pytest.mark.parametrize("model_type", [*CALLED, "longcat_flash"])
def test_values_and_tokens(model_type, num_slots, dense):
    """Twice, so that the second passes find experts. Both sums have K terms of fp32, in two
    orders: they differ by 2 K epsilon of the terms, which the layers after it amplify."""
    want, got = cached_pair(model_type, dense, num_slots)
    ids = tokens().to(dense)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(generate(got, dense), generate(want, dense))
    for cache in caches_of(got):
        assert cache.hits > 0 and cache.copies > 0
        assert 0 < len(cache.experts) <= num_slots


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "jetmoe", "llama4_text"])
@pytest.mark.parametrize(
    "config",
    [moe_ops.Int8WeightConfig(), moe_ops.Int4WeightConfig(32)],
    ids=lambda c: c.label,
)
def test_quantized(model_type, config, dense):
    sizes = SIZES | ({"moe_intermediate_size": 32} if model_type == "qwen3_moe" else {})
    want, got = cached_pair(model_type, dense, 3, config, **sizes)
    ids = tokens()[:, :3].to(dense)
    # Kernels of a GPU round tokens to 16 bits, those of the CPU to 8.
    close = {"rtol": 1e-4, "atol": 1e-5} if dense == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(got(ids).logits, want(ids).logits, **close)
    caches = [cache for cache in caches_of(got) if cache is not None]
    assert caches and all(cache.hits > 0 for cache in caches)


@pytest.mark.parametrize(
    "case",
    [
        ("gpt_oss", "mxfp4", False),
        ("qwen3_moe", "fp8", False),
        ("qwen3_moe", "nvfp4", False),
        ("mixtral", "gptq", True),
        ("mixtral", "fp8-tensor", False),
    ],
    ids=lambda c: f"{c[0]}-{c[1]}",
)
def test_published_formats(case, dense, tmp_path):
    """Experts as others store them. The CPU rounds tokens of 4-bit and fp8 experts to 8 bits in
    both models; slots on a GPU need not."""
    with torch.device("cpu"):
        published_checkpoints.write(tmp_path, *case)
        want = published_checkpoints.load(tmp_path)
        got = copy.deepcopy(want)
    moe_ops.hf.place(want, dense)
    moe_ops.hf.place(got, dense, cached_experts=3)
    ids = torch.randint(1, 64, (1, 6), device=dense)
    with torch.no_grad():
        for _ in range(2):
            found, wanted = got(ids).logits, want(ids).logits
            bound = 1e-5 if dense == "cpu" else 0.08
            assert (found - wanted).norm() <= bound * wanted.norm()
    assert all(cache.hits > 0 and cache.copies > 0 for cache in caches_of(got))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_bfloat16(model_type, dense):
    want, got = cached_pair(model_type, dense, 3, dtype=torch.bfloat16)
    bank, other = experts_of(got)[0], experts_of(want)[0]
    x = torch.randn(5, 32, device=dense).bfloat16()
    ids = torch.rand(5, bank.num_experts, device=dense).topk(2).indices
    weights = torch.rand(5, 2, device=dense)
    with torch.no_grad():
        for _ in range(3):
            found, wanted = bank(x, ids, weights).float(), other(x, ids, weights).float()
            # The two parts and their sum are rounded; parts may be larger than their sum.
            size = sum(
                other(x, ids[:, k : k + 1], weights[:, k : k + 1]).float().abs() for k in range(2)
            )
            bound = (4 if dense == "cpu" else 16) * torch.finfo(torch.bfloat16).eps * size
            assert ((found - wanted).abs() <= bound + 1e-6).all()
    assert bank.expert_cache.hits > 0


def test_least_recently_used_and_counts(dense):
    """Experts of a call keep their slots; the others leave in the order of their last use."""
    _, got = cached_pair("qwen3_moe", dense, 3)
    bank = experts_of(got)[0]
    cache, x = bank.expert_cache, torch.randn(1, 32, device=dense)

    def call(*experts):
        with torch.no_grad():
            bank(x, torch.tensor([experts], device=dense), torch.ones(1, len(experts)).to(dense))
        if dense == "cuda":
            torch.cuda.synchronize()
        return set(cache.experts)

    assert call(0, 1) == {0, 1}
    assert call(1, 2) == {0, 1, 2}
    assert (cache.hits, cache.misses, cache.copies) == (1, 3, 3)
    assert call(3, 1) == {1, 2, 3}  # 0 was used least recently.
    assert call(1, 2) == {1, 2, 3}
    assert call(4, 5) == {2, 4, 5}
    assert call(0, 1, 2) == {0, 1, 2}
    assert call(3) == {1, 2, 3}
    assert call(-1, 1000) == {1, 2, 3}


def test_a_call_of_more_experts_than_slots_fills_free_slots_only(dense):
    """It computes hits in the slots and evicts nothing, whether one of its tokens selects more than
    N experts or all of them together do. The next calls find the experts of the earlier ones."""
    want, got = cached_pair("qwen3_moe", dense, 3)
    bank, other = experts_of(got)[0], experts_of(want)[0]
    cache = bank.expert_cache

    def call(*ids):
        topk_ids = torch.tensor(ids, device=dense)
        x, weights = torch.randn(len(ids), 32, device=dense), torch.rand(topk_ids.shape).to(dense)
        with torch.no_grad():
            torch.testing.assert_close(bank(x, topk_ids, weights), other(x, topk_ids, weights))
        if dense == "cuda":
            torch.cuda.synchronize()
        return set(cache.experts), cache.hits, cache.misses, cache.copies

    assert call([0, 1]) == ({0, 1}, 0, 2, 2)
    assert call([4, 1], [5, 2], [0, 3]) == ({0, 1, 3}, 2, 6, 3)  # The last token's experts first.
    assert call([4, 1], [5, 2], [0, 6]) == ({0, 1, 3}, 4, 10, 3)
    assert call([4, 5, 6, 1]) == ({0, 1, 3}, 5, 13, 3)
    assert call([4, 4], [5, -1], [6, 1000]) == ({4, 5, 6}, 5, 17, 6)  # Three experts fit.
    assert call([4, 6]) == ({4, 5, 6}, 7, 17, 6)


def test_a_slot_serves_after_its_copy(dense, monkeypatch):
    """Until then, the CPU computes the expert, and no other expert takes the slot."""
    want, got = cached_pair("qwen3_moe", dense, 2)
    bank, other = experts_of(got)[0], experts_of(want)[0]
    cache, pending = bank.expert_cache, set()
    filled = cached.ExpertSlots._is_filled
    monkeypatch.setattr(
        cached.ExpertSlots, "_is_filled", lambda s, slot: slot not in pending and filled(s, slot)
    )
    x, weights = torch.randn(1, 32, device=dense), torch.ones(1, 2, device=dense)

    def check(*experts):
        ids = torch.tensor([experts], device=dense)
        with torch.no_grad():
            torch.testing.assert_close(bank(x, ids, weights), other(x, ids, weights))

    pending.update((0, 1))
    check(0, 1)
    check(0, 1)
    assert (cache.hits, cache.misses, cache.copies) == (0, 4, 2)
    check(2, 3)  # Both slots are being filled.
    assert (cache.hits, cache.misses, cache.copies) == (0, 6, 2)
    pending.clear()
    check(0, 1)
    assert (cache.hits, cache.misses, cache.copies) == (2, 6, 2)


def test_training_ignores_the_cache_and_weights_may_change(dense):
    want, got = cached_pair("qwen3_moe", dense, 3)
    ids = tokens().to(dense)

    def check(ours):
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(ours(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)

    check(got)
    before = [cache.hits for cache in caches_of(got)]
    theirs, ours = (loss_and_gradients(model, ids) for model in (want, got))
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name].cpu(), gradient.cpu(), rtol=1e-3, atol=1e-5)
    assert [cache.hits for cache in caches_of(got)] == before
    assert not any(cache.experts for cache in caches_of(got))
    check(got)
    for model in (want, got):
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.mul_(1.5)
    check(got)
    check(copy.deepcopy(got))
    check(got.double().float())


def test_other_implementations_ignore_the_cache(dense):
    want, got = cached_pair("mixtral", dense, 3)
    for model in (want, got):
        moe_ops.hf.disable(model)
    ids = tokens().to(dense)
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(cache.hits == cache.misses == 0 for cache in caches_of(got))


def test_options_and_streaming(dense):
    model = build("qwen3_moe").cpu()
    with pytest.raises(ValueError, match="cached_experts must be None or at least 1, got 0"):
        moe_ops.hf.place(model, dense, cached_experts=0)
    found = moe_ops.hf.place(model, dense, cached_experts=2, stream_min_tokens=20)
    assert set(found.values()) == {f"cpu, {dense} from 20 tokens, 2 experts cached on {dense}"}
    assert str(moe_ops.hf.report(model)).count(", 2 experts cached on the GPU") == 2
    ids = tokens().to(dense)
    with torch.no_grad():
        model(ids)  # This pass is streamed.
        assert all(c.hits == c.misses == 0 for c in caches_of(model))
        model(ids[:1, :4])
    caches = caches_of(model)
    assert all(cache.misses > 0 and cache._tensors for cache in caches)
    moe_ops.hf.unplace(model)
    assert not any(cache._tensors for cache in caches)
    moe_ops.hf.place(model, dense)
    assert caches_of(model) == [None, None]
    with pytest.raises(ValueError, match="without experts that can be cached, got 2; quantize"):
        moe_ops.hf.place(build("jetmoe").cpu(), dense, cached_experts=2)
