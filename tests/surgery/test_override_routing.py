"""Routing otherwise for a while: the choice is the rule's, the weights are the router's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.surgery.models import TwoLayers, deepseek, tokens
from torch.utils.checkpoint import checkpoint

from moe_ops import surgery, zoo
from moe_ops.layers import MoE, Router, record_routing

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


def moe(**router) -> MoE:
    torch.manual_seed(0)
    return MoE.build(6, 5, 4, 2, **router)


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))


def order(layer: MoE) -> torch.Tensor:
    return layer.router.logits(X).argsort(dim=-1, descending=True)


def test_rank_is_the_choice_of_that_place_with_its_own_weight():
    layer = moe()
    with surgery.override_routing(layer, surgery.rules.rank(2)) as changed:
        out = layer(X, return_routing=True)
    assert [c.name for c in changed] == [""]
    second = order(layer)[:, 1:2]
    assert torch.equal(out.topk_ids.long(), second)
    expected = layer.router.logits(X).softmax(-1).gather(1, second)
    torch.testing.assert_close(out.topk_weights, expected)
    torch.testing.assert_close(out.y, layer(X, topk_ids=second))


def test_renormalize_makes_a_lone_expert_count_fully():
    layer = moe(routed_scaling_factor=2.5)
    with surgery.override_routing(layer, surgery.rules.rank(2), renormalize=True):
        out = layer(X, return_routing=True)
    assert torch.allclose(out.topk_weights, torch.full((7, 1), 2.5))


def test_top_k_of_a_router_with_bias_and_groups_is_the_router_with_that_k():
    options = {"score_func": "sigmoid", "renormalize": True, "expert_bias": True, "num_groups": 4}
    options |= {"num_topk_groups": 2, "group_score": "top2_sum"}
    torch.manual_seed(0)
    router, other = Router(6, 8, 2, **options), Router(6, 8, 3, **options)
    router.expert_bias.normal_()
    other.load_state_dict(router.state_dict())
    with surgery.override_routing(torch.nn.Sequential(router), surgery.rules.top_k(3)):
        got = router(X)
    expected = other(X)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    torch.testing.assert_close(got.topk_weights, expected.topk_weights)
    with surgery.override_routing(torch.nn.Sequential(router), surgery.rules.top_k(5)):
        with pytest.raises(ValueError, match="k must be at most 4"):
            router(X)


@pytest.mark.parametrize("experts", [[1, 3], [False, True, False, True]])
def test_only_is_the_mask_of_the_layer(experts):
    layer = moe(renormalize=True)
    mask = torch.tensor([False, True, False, True])
    with surgery.override_routing(layer, surgery.rules.only(torch.tensor(experts))):
        got = layer(X)
    torch.testing.assert_close(got, layer(X, expert_mask=mask))


def test_only_fewer_experts_than_k_leaves_no_empty_slots():
    layer = moe(renormalize=True)
    with surgery.override_routing(layer, surgery.rules.only([2])):
        out = layer(X, return_routing=True)
    assert torch.equal(out.topk_ids, torch.full((7, 1), 2, dtype=torch.int32))
    assert torch.allclose(out.topk_weights, torch.ones(7, 1))


def test_given_random_and_rules_by_layer():
    model = TwoLayers()
    with surgery.override_routing(model, {"layers.1": surgery.rules.given([3])}):
        with record_routing(model) as record:
            model(X)
    assert record["layers.0"][0].topk_ids.shape == (7, 2)
    assert torch.equal(record["layers.1"][0].topk_ids, torch.full((7, 1), 3))
    generator = torch.Generator().manual_seed(0)
    with (
        surgery.override_routing(model, surgery.rules.random(3, generator=generator)),
        record_routing(model) as r,
    ):
        model(X)
    ids = r["layers.0"][0].topk_ids.sort(-1).values
    assert ids.shape == (7, 3) and bool((ids.diff(dim=-1) > 0).all())
    assert not torch.equal(ids, r["layers.1"][0].topk_ids.sort(-1).values)


def test_contexts_nest_and_end():
    layer = moe()
    plain = layer(X)
    with surgery.override_routing(layer, surgery.rules.top_k(1)):
        one = layer(X)
        with surgery.override_routing(layer, surgery.rules.top_k(2)):
            torch.testing.assert_close(layer(X), plain)
        torch.testing.assert_close(layer(X), one)
    assert torch.equal(layer(X), plain)
    with pytest.raises(RuntimeError, match="inside"):
        with surgery.override_routing(layer, surgery.rules.top_k(1)):
            raise RuntimeError("inside")
    assert torch.equal(layer(X), plain)


def test_gradients_reach_the_router_and_recomputation_repeats_random_choices():
    layer = moe(renormalize=True).train()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(5)
        layer.zero_grad()
        with surgery.override_routing(layer, surgery.rules.random()):
            y = checkpoint(layer, X, use_reentrant=False) if recompute else layer(X)
            y.square().sum().backward()
        grads.append(layer.router.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["jetmoe", "moduleformer", "coe", "topp"])
def test_other_systems_of_the_zoo(name):
    torch.manual_seed(0)
    model = zoo.create_model(name).eval()
    ids = torch.randint(256, (1, 5))
    with torch.no_grad():
        plain = model(ids)
        with surgery.override_routing(model, surgery.rules.top_k(1)) as changed:
            one = model(ids)
        assert torch.equal(model(ids), plain)
    assert len(changed) >= model.config.num_layers
    assert one.shape == plain.shape and not torch.allclose(one, plain)


def test_generation_of_the_zoo_is_routed_too():
    model, ids = deepseek(), tokens(1, 4)
    with surgery.override_routing(model, surgery.rules.rank(1)):
        with torch.no_grad():
            longer = model.generate(ids, 3)
            logits = model(longer[:, :-1])
    assert torch.equal(logits[0, -3:].argmax(-1), longer[0, -3:])


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="must hold a routed layer"):
        with surgery.override_routing(torch.nn.Linear(2, 2), surgery.rules.top_k(1)):
            pass
    model = TwoLayers()
    with pytest.raises(ValueError, match="must match names of routed layers"):
        with surgery.override_routing(model, surgery.rules.top_k(1), layers=["blocks.*"]):
            pass
    with pytest.raises(ValueError, match="ids \\[7, K\\] of an integer type"):
        with surgery.override_routing(model, lambda layer, logits, mask: logits):
            model(X)
    with pytest.raises(ValueError, match="must be ids in \\[0, 4\\)"):
        with surgery.override_routing(model, surgery.rules.only([4])):
            model(X)
    for wrong in (
        lambda: surgery.rules.rank(0),
        surgery.rules.rank,
        lambda: surgery.rules.top_k(0),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()
    assert all(layer.router.override is None for layer in model.layers)


@needs_transformers
@pytest.mark.parametrize("experts", ["eager", "moe_ops"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "phimoe"])
def test_models_of_transformers(model_type, experts):
    from tests.hf import models

    import moe_ops.hf  # noqa: F401

    model = models.build(model_type, experts)
    ids = models.tokens(1, 6)
    name = models.BLOCK_NAMES[model_type]
    seen = []
    block = model.get_submodule(name)
    block.experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    k = models.build(model_type).config.num_experts_per_tok
    with torch.no_grad():
        plain = model(ids).logits
        with surgery.override_routing(model, surgery.rules.top_k(k)) as changed:
            same = model(ids).logits
        with surgery.override_routing(
            model, surgery.rules.rank(2), layers=[name], renormalize=True
        ):
            model(ids)
        assert torch.equal(model(ids).logits, plain)
    assert len(changed) == models.NUM_BLOCKS[model_type]
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    (_, own_ids, own_weights), (_, rank_ids, rank_weights) = seen[0], seen[2]
    assert rank_ids.shape == (6, 1) and own_ids.shape == (6, k)
    scale = getattr(model.config, "routed_scaling_factor", None) or 1.0
    assert torch.allclose(rank_weights, torch.full_like(rank_weights, scale))
    if model_type != "phimoe":
        best_two = own_weights.topk(2, dim=-1).indices
        if model_type != "deepseek_v3":  # Its bias ranks otherwise than weights do.
            assert torch.equal(rank_ids, own_ids.gather(1, best_two[:, 1:]))


@needs_transformers
@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "llama4_text"])
@torch.no_grad()
def test_models_outside_of_the_experts_interface(model_type, switched):
    from tests.hf import models

    import moe_ops.hf

    model = models.build(model_type)
    ids = models.tokens(1, 6)
    plain = model(ids).logits
    with surgery.override_routing(model, surgery.rules.rank(2)):
        expected = model(ids).logits  # By transformers' own block.
    if switched:
        moe_ops.hf.enable(model)
    k = surgery.find_routed_layers(model)[0].top_k
    if switched and model_type == "llama4_text":
        with surgery.override_routing(model, surgery.rules.top_k(k)):
            with pytest.raises(ValueError, match=r"call moe_ops\.hf\.disable first"):
                model(ids)
        return
    with surgery.override_routing(model, surgery.rules.top_k(k)):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    with surgery.override_routing(model, surgery.rules.rank(2)):
        got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
