"""Dynamic top-p routing against its published rule, its losses, its keys."""

from __future__ import annotations

import pytest
import torch
from bench.studies.topp_controller import experts_per_token
from safetensors.torch import load_file

from moe_ops import zoo
from moe_ops.layers import Router
from moe_ops.zoo.topp import TopP, TopPConfig

from .lm import common
from .lm.common import published_tensors, sharpen, tokens_of
from .lm.llama import attention, rms_norm, swiglu

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_experts": 6}


def build(**changes):
    return sharpen(zoo.create_model("topp", **SMALL, **changes)).double()


def by_hand(w, config, tokens):
    """The published rule: sort, sum up, keep up to the first sum above p; raw probabilities."""
    x, counts = w["model.embed_tokens.weight"][tokens], []
    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        u = rms_norm(x, w[f"{p}.input_norm.weight"])
        x = x + attention(w, f"{p}.self_attn", u, config.num_heads)
        u = rms_norm(x, w[f"{p}.post_attention_norm.weight"])
        if i % config.expert_frequency:
            x = x + swiglu(w, f"{p}.mlp.mlp", u)
            continue
        rows = []
        for t in range(len(tokens)):
            s = (u[t] @ w[f"{p}.mlp.router.weight"].T).softmax(-1)
            y, total, used = torch.zeros_like(u[t]), 0.0, 0
            for e in s.argsort(descending=True).tolist():
                y = y + s[e] * swiglu(w, f"{p}.mlp.experts.{e}", u[t])
                total, used = total + float(s[e]), used + 1
                if total > config.top_p:
                    break
            rows.append(y)
            counts.append(used)
        x = x + torch.stack(rows)
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T, counts


@pytest.mark.parametrize(
    "changes",
    [{}, {"expert_frequency": 2, "num_layers": 3}, {"top_p": 0.9}, {"top_p": 1.0}],
    ids=["p=0.4", "every second", "p=0.9", "all"],
)
def test_equals_its_equations(changes):
    model = build(**changes)
    tokens = tokens_of(model, 1, 15)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    expected, counts = by_hand(w, model.config, tokens[0])
    out = model(tokens, return_routing=True)
    torch.testing.assert_close(out.logits[0], expected, rtol=1e-5, atol=1e-5)
    used = torch.cat(list(experts_per_token(out.routing).values()))
    assert used.tolist() == counts
    if model.config.top_p == 0.4:
        assert 1 < len(set(counts)) and 1 in counts


def test_slots_are_ragged(monkeypatch):
    """Only the experts that a token uses are computed: unused slots hold no expert."""
    model = build(top_p=0.7, max_experts=4)
    routing = model(tokens_of(model), return_routing=True).routing[0].routing
    assert routing.topk_ids.shape[1] == 4
    unused = routing.topk_ids < 0
    assert bool(unused.any()) and bool((routing.topk_weights[unused] == 0).all())
    # Unused ones come last, and the used ones gather p unless there are 4 of them.
    used = ~unused
    assert bool((used.int().diff(dim=1) <= 0).all())
    total = routing.topk_weights.sum(-1)
    assert bool(((total >= 0.7) | (used.sum(-1) == 4)).all())
    layer = model.layers[0].mlp
    with torch.no_grad():
        x = torch.randn(5, 32, dtype=torch.float64)
        out = layer(x, return_routing=True)
        unlucky = [e for e in range(6) if e not in out.topk_ids.tolist()[0]]
        layer.experts.w_down[unlucky] = torch.nan
        assert bool(layer(x[:1]).isfinite().all())


def test_losses_are_what_they_say():
    model = build()
    out = model.loss(tokens_of(model, 3, 9))
    balance = entropy = 0.0
    for r in out.routing:
        p, ids = r.routing.router_logits.softmax(-1), r.routing.topk_ids
        slots = ids[ids >= 0]
        share = torch.tensor([float((slots == e).double().mean()) for e in range(6)])
        balance += 6 * (share.double() * p.mean(0)).sum()
        entropy += -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(out.aux_losses["load_balancing"], balance)
    torch.testing.assert_close(out.aux_losses["entropy"], entropy)
    torch.testing.assert_close(out.loss, out.cross_entropy + 1e-2 * balance + 1e-4 * entropy)


def test_entropy_loss_makes_tokens_use_fewer_experts():
    model = build(top_p=0.8)
    tokens = tokens_of(model, 4, 17)
    optimizer = torch.optim.Adam([r.weight for r in model.modules() if isinstance(r, Router)], 0.05)

    def mean():
        used = experts_per_token(model(tokens, return_routing=True).routing)
        return float(torch.cat(list(used.values())).double().mean())

    before = mean()
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(tokens, coefficients={"entropy": 1.0}).aux_losses["entropy"].backward()
        optimizer.step()
    assert mean() < before - 0.5


def test_cache():
    common.check_cache(build())


def test_generate():
    common.check_generate(build().float())


def test_gradients_flow():
    common.check_gradients_flow(build())


def test_compile():
    common.check_compiles(build())


def test_round_trip(tmp_path):
    model = build(expert_frequency=2).float()
    common.check_round_trip(model, tmp_path, a_key="model.layers.1.mlp.mlp.up_proj.weight")
    keys = load_file(tmp_path / "one" / "model.safetensors")
    assert "model.layers.0.mlp.experts.5.down_proj.weight" in keys
    assert "model.layers.0.post_attention_norm.weight" in keys


def test_bad_configs():
    published = TopPConfig.tiny().to_published()
    with pytest.raises(ValueError, match="num_key_value_heads must be 4, got 2"):
        TopPConfig.from_published({**published, "num_key_value_heads": 2})
    with pytest.raises(ValueError, match="num_heads must divide hidden_size = 32, got 5"):
        TopP(zoo.get("topp").make_config(**SMALL, num_heads=5))
