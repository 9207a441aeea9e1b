"""Each way of routing is a class of its own: how `Router` finds it, and what a new one needs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor

from moe_ops.layers import (
    ExpertChoiceRouter,
    Router,
    RouterConfig,
    Routing,
    SparseMixerRouter,
    TopKRouter,
    TopPRouter,
)

T, H, I, E, K = 13, 6, 5, 8, 2
KINDS = {
    "topk": TopKRouter,
    "topp": TopPRouter,
    "expert_choice": ExpertChoiceRouter,
    "sparsemixer": SparseMixerRouter,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_classes(kind):
    router = build_router(H, E, K, kind=kind)
    assert type(router) is KINDS[kind] and isinstance(router, Router) and router.kind == kind
    assert type(KINDS[kind](H, E, K, bias=True)) is KINDS[kind]
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), router.select([3, 1])):
        assert type(twin) is KINDS[kind]
    with pytest.raises(TypeError, match="other"):
        KINDS[kind](H, E, K, other=1)


def test_configurations():
    with pytest.raises(ValueError, match=r"kind must be .*, got 'other'"):
        RouterConfig("other")
    with pytest.raises(ValueError, match=r"TopPRouter with kind='topp', got topk_first"):
        RouterConfig("topp", topk_first=True)
    config = RouterConfig("topp", top_p=0.5)
    assert config == RouterConfig("topp", top_p=0.5) != RouterConfig("topp", top_p=0.6)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert eval(repr(config), {"RouterConfig": lambda kind, options: (kind, options)}) == (
        "topp",
        {"top_p": 0.5},
    )
    router = config.build(H, E, K)
    assert type(router) is TopPRouter and router.top_p == 0.5


def test_one_type_of_routing():
    out = build_moe(H, I, E, K)(torch.randn(T, H), return_routing=True)
    assert out.routing == Routing(out.router_logits, out.topk_weights, out.topk_ids)


# ------------------------------------------------------------------------------- a new router


class Threshold(Router):
    """At most K experts, of a probability over a threshold."""

    def __init__(self, *sizes: int, threshold: float = 0.1, **options) -> None:
        super().__init__(*sizes, **options)
        self.threshold = threshold

    def choose_experts(self, router_logits: Tensor, expert_mask: Tensor | None):
        weights, ids = router_logits.softmax(-1).topk(self.top_k)
        low = weights < self.threshold
        return weights.masked_fill(low, 0.0), ids.int().masked_fill(low, -1)


def test_a_router_is_one_method():
    moe = build_moe(H, I, E, K, dtype=torch.float64, freeze_routing_in_recompute=True)
    moe.router = Threshold(H, E, K, threshold=0.14, dtype=torch.float64)
    x = torch.randn(T, H, dtype=torch.float64)
    out = moe(x, return_routing=True)
    assert (out.topk_ids < 0).any() and (out.topk_ids >= 0).any()
    weights = moe.router.weights_at(out.router_logits, out.topk_ids)
    torch.testing.assert_close(weights, out.topk_weights)
    given = moe(x, topk_ids=out.topk_ids)
    torch.testing.assert_close(given, out.y)
    again = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
    again.sum().backward()
    assert moe.router.weight.grad.isfinite().all()

    mask = torch.tensor([True] * 4 + [False] * 4)
    few = moe.select([0, 1, 2, 3])
    assert type(few.router) is Threshold and few.router.threshold == 0.14
    torch.testing.assert_close(few(x), moe(x, expert_mask=mask))
    assert type(moe.append(2).router) is Threshold
    with pytest.raises(ValueError, match="kind='topk'"):
        moe.split(factor=2)


def test_a_router_may_have_a_kind():
    class Named(Threshold, kind="threshold"):
        pass

    try:
        assert type(build_router(H, E, K, kind="threshold", threshold=0.2)) is Named
        moe = build_moe(H, I, E, K, kind="threshold")
        assert "kind='threshold'" in repr(moe.router)
    finally:
        del Router.kinds["threshold"]


def test_a_router_without_its_method():
    class Empty(Router):
        pass

    with pytest.raises(NotImplementedError, match="Empty must override choose_experts"):
        Empty(H, E, K)(torch.randn(T, H))
