"""Capacity of experts: which slots are dropped."""

from __future__ import annotations

import math

import pytest
import torch

from moe_ops.layers import CapacityMixin, CapacityRouter, MoE, Router, SparseMixerRouter, TopPRouter
from moe_ops.layers.router.capacity import drop_over_capacity

T, H, I, E, K = 40, 6, 5, 4, 2


def by_hand(weights, ids, capacity, by):
    """Slots served one after another."""
    slots = [(k, t) for k in range(ids.shape[1]) for t in range(ids.shape[0])]
    if by == "weight":
        slots.sort(key=lambda slot: -weights[slot[1], slot[0]].item())  # stable
    taken = [0] * E
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for k, t in slots:
        e = int(ids[t, k])
        if 0 <= e < E and taken[e] < capacity:
            taken[e] += 1
            kept[t, k] = True
    return kept


@pytest.mark.parametrize("by", ["position", "weight"])
@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 100])
def test_slots_are_dropped_in_order(by, capacity):
    ids = torch.randint(-1, E + 1, (T, K), dtype=torch.int32)
    # Few values, so that there are ties.
    weights = torch.randint(1, 5, (T, K)).double().requires_grad_()
    kept_weights, kept_ids = drop_over_capacity(weights, ids, E, capacity, by=by)
    kept = by_hand(weights, ids, capacity, by)
    valid = (ids >= 0) & (ids < E)
    assert torch.equal(kept_ids, torch.where(kept | ~valid, ids, -1))
    assert torch.equal(kept_weights, torch.where(kept | ~valid, weights, 0.0))
    (grad,) = torch.autograd.grad(kept_weights.sum(), weights)
    assert torch.equal(grad, (kept | ~valid).double())
    assert kept_ids.dtype == ids.dtype


def test_bad_calls():
    weights, ids = torch.ones(3, 2), torch.zeros(3, 2).int()
    for call, word in (
        (lambda: drop_over_capacity(weights, ids, E, 1, by="age"), "by"),
        (lambda: drop_over_capacity(weights, ids, E, -1), "capacity"),
        (lambda: drop_over_capacity(weights[:2], ids, E, 1), "topk_ids"),
        (lambda: CapacityRouter(H, E, K, capacity_factor=0.0), "capacity_factor"),
        (lambda: CapacityRouter(H, E, K, drop_by="age"), "drop_by"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert word in str(caught.value) and ", got " in str(caught.value)
    empty = drop_over_capacity(weights[:0], ids[:0], E, 1)
    assert empty[0].shape == empty[1].shape == (0, 2)


@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 4.0])
def test_router_drops_what_is_over_its_share(factor):
    router = CapacityRouter(H, E, K, capacity_factor=factor, renormalize=True, dtype=torch.float64)
    assert type(Router(H, E, K, kind="capacity")) is CapacityRouter
    plain = Router(H, E, K, renormalize=True, dtype=torch.float64)
    plain.load_state_dict(router.state_dict())
    x = torch.randn(T, H, dtype=torch.float64)
    _, weights, ids = router(x)
    _, all_weights, all_ids = plain(x)
    capacity = math.ceil(factor * T * K / E)
    kept = by_hand(all_weights, all_ids, capacity, "position")
    assert torch.equal(ids, torch.where(kept, all_ids, -1))
    assert torch.equal(weights, torch.where(kept, all_weights, 0.0))
    assert ids[ids >= 0].bincount(minlength=E).max() <= capacity
    # Nothing is dropped in evaluation, unless asked for.
    assert torch.equal(router.eval()(x).topk_ids, all_ids)
    router.eval_capacity_factor = factor
    assert torch.equal(router(x).topk_ids, ids)


def test_any_router_can_have_a_capacity():
    class TopP(CapacityMixin, TopPRouter):
        pass

    class Mixer(CapacityMixin, SparseMixerRouter):
        pass

    x = torch.randn(T, H)
    for cls, options in ((TopP, {"top_p": 0.9}), (Mixer, {"sparsemixer_eps": 0.5})):
        router = cls(H, E, K, capacity_factor=0.5, drop_by="weight", **options)
        ids = router(x).topk_ids
        assert (ids < 0).any()
        assert ids[ids >= 0].bincount(minlength=E).max() <= math.ceil(0.5 * T * K / E)
        small = router.select([2, 0, 1])
        assert type(small) is cls and small.capacity_factor == 0.5 and small.drop_by == "weight"


def test_in_a_layer():
    moe = MoE.build(H, I, E, K, kind="capacity", capacity_factor=0.5, dtype=torch.float64)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    dropped = (out.topk_ids < 0).all(1)
    assert dropped.any() and (out.y[dropped] == 0).all() and (out.y[~dropped] != 0).any()
    outputs = moe.experts.outputs(x)
    index = out.topk_ids.clamp(min=0).long()[..., None].expand(-1, -1, H)
    expected = (out.topk_weights[..., None] * outputs.gather(1, index)).sum(1)
    torch.testing.assert_close(out.y, expected)
    leaves = [x, moe.router.weight]
    got = torch.autograd.grad(out.y.square().sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="mode='slice' needs"):
        moe.split(factor=5)
