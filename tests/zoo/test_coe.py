"""Chain-of-Experts against its equations, both residuals, gates, and the published keys."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from moe_ops import zoo
from moe_ops.layers import Experts, Router, sequence_balance_loss
from moe_ops.zoo.coe import ChainOfExperts, CoE, CoEConfig

from .lm import common
from .lm.common import published_tensors, sharpen, tokens_of
from .lm.llama import rms_norm, swiglu

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 20, "num_experts": 7}
VARIANTS = {
    "both": {},
    "published": {"outer_residual": False},
    "outer": {"inner_residual": False},
    "none": {"inner_residual": False, "outer_residual": False},
    "one_gate": {"own_gates": False},
    "once": {"num_iterations": 1, "top_k": 4},
    "thrice": {"num_iterations": 3, "top_k": 1, "num_shared_experts": 0, "renormalize": True},
}


def build(variant="both"):
    return sharpen(zoo.create_model("coe", **SMALL, **VARIANTS[variant])).double()


def chain_by_hand(w, prefix, config, x):
    """x_t token by token, on the tensors of a checkpoint."""
    rows = []
    for u in x:
        for t in range(config.num_iterations):
            gate = f"{prefix}.gate.{t}" if config.own_gates else f"{prefix}.gate"
            p = (w[f"{gate}.weight"] @ u).softmax(-1)
            chosen = p.argsort(descending=True)[: config.top_k]
            weights = p[chosen]
            if config.renormalize:
                weights = weights / weights.sum()
            y = torch.zeros_like(u)
            for weight, e in zip(weights, chosen.tolist(), strict=True):
                y = y + weight * swiglu(w, f"{prefix}.experts.{e}", u)
            if config.num_shared_experts:
                y = y + swiglu(w, f"{prefix}.shared_experts", u)
            u = u + y if config.inner_residual else y
        rows.append(u)
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_equations(variant):
    """Block by block: what the blocks add to, or put in the place of, the stream."""
    model = build(variant)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    tokens, config = tokens_of(model, 1, 9), model.config
    x = w["model.embed_tokens.weight"][tokens]
    rotation = model.rope.rotation(0, 9)
    for i, block in enumerate(model.layers):
        p = f"model.layers.{i}"
        normed = rms_norm(x, w[f"{p}.input_layernorm.weight"])
        x = x + block.attention(normed, rotation).detach()
        y = chain_by_hand(
            w, f"{p}.mlp", config, rms_norm(x, w[f"{p}.post_attention_layernorm.weight"])[0]
        )
        x = x + y if config.outer_residual else y[None]
    expected = rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    # Routers compute in fp32.
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


def test_one_iteration_without_residual_is_a_moe_layer():
    from moe_ops.layers import MoE

    router, bank = Router(8, 5, 2), Experts(5, 8, 6)
    chain = ChainOfExperts([router], bank, None, 1, inner_residual=False)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(chain(x), MoE(router, bank)(x))


def test_iterations_choose_for_themselves():
    own, shared = build("both"), build("one_gate")
    for model, routers in ((own, 2), (shared, 1)):
        routing = model(tokens_of(model), return_routing=True).routing
        assert [r.layer for r in routing] == [
            f"layers.{i}.mlp.iteration.{t}" for i in (0, 1) for t in (0, 1)
        ]
        assert len({id(r.router) for r in routing}) == 2 * routers


def test_losses_are_per_iteration():
    model = build()
    out = model.loss(tokens_of(model, 3, 9))
    assert len(out.routing) == 4
    expected = sum(
        sequence_balance_loss(
            r.routing.router_logits, r.routing.topk_ids, num_sequences=3, score_func="softmax"
        )
        for r in out.routing
    )
    torch.testing.assert_close(out.aux_losses["sequence_balance"], expected)
    torch.testing.assert_close(out.loss, out.cross_entropy + 1e-3 * expected)


def test_cache():
    common.check_cache(build("both").float())
    common.check_cache(build("published").float())


def test_generate():
    common.check_generate(build().float())


@pytest.mark.parametrize("variant", ["both", "published", "one_gate"])
def test_gradients_flow(variant):
    common.check_gradients_flow(build(variant))


def test_compile():
    common.check_compiles(build())


@pytest.mark.parametrize("variant", ["both", "published", "one_gate", "thrice"])
def test_round_trip(variant, tmp_path):
    model = build(variant).float()
    gate = "gate.1" if model.config.own_gates else "gate"
    common.check_round_trip(model, tmp_path, a_key=f"model.layers.1.mlp.{gate}.weight")
    keys = load_file(tmp_path / "one" / "model.safetensors")
    assert "model.layers.0.mlp.experts.6.up_proj.weight" in keys
    shared = "model.layers.0.mlp.shared_experts.up_proj.weight" in keys
    assert shared == bool(model.config.num_shared_experts)


def test_presets():
    """544 million parameters as published; two iterations of 4 and one of 8 have the same ones
    but for a router."""
    with torch.device("meta"):
        twice, once = CoE(CoEConfig.c2k4()), CoE(CoEConfig.c1k8())
    a, b = twice.num_parameters(), once.num_parameters()
    assert 0.5e9 < a["total"] - twice.lm_head.weight.numel() < 0.8e9
    assert a["total"] - b["total"] == 4 * 63 * 1024
    assert a["active"] - b["active"] == 4 * 63 * 1024
    assert not CoEConfig.c2k4().outer_residual
    assert CoEConfig.from_published(CoEConfig.c2k4().to_published()) == CoEConfig.c2k4()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": "addinit"}, "residual must be one of inner, outer, none, got 'addinit'"),
        ({"seq_aux": False}, "seq_aux must be True, got False"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace must be 0, got 1"),
    ],
)
def test_configs_of_something_else(change, words):
    with pytest.raises(ValueError, match=f"CoEConfig: {words}"):
        CoEConfig.from_published({**CoEConfig.tiny().to_published(), **change})


def test_bad_chains():
    router, bank = Router(8, 5, 2), Experts(5, 8, 6)
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        ChainOfExperts([router], bank, None, 0, inner_residual=True)
    with pytest.raises(ValueError, match="routers must be one or 3, got 2"):
        ChainOfExperts([router, router], bank, None, 3, inner_residual=True)
