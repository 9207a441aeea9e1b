"""ModuleFormer against its equations."""

from __future__ import annotations

import math

import pytest
import torch

from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from ..lm import common
from ..lm.common import published_tensors, tokens_of
from .common import build, gate


def norm(w, name, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def by_hand(w, config, tokens):
    """The equations of arXiv 2306.04640 one query, head and expert at a time, on the tensors of a
    checkpoint, whose experts are [inputs, outputs]."""
    heads, size = config.num_heads, config.attention_size // config.num_heads
    x = w["transformer.wte.weight"][tokens]
    length = len(tokens)
    for i in range(config.num_layers):
        p = f"transformer.h.{i}"
        u = norm(w, f"{p}.ln_1", x)
        k, v = (
            (u @ w[f"{p}.attn.{n}_proj.weight"].T + w[f"{p}.attn.{n}_proj.bias"]).view(
                length, heads, size
            )
            for n in "kv"
        )
        probabilities = gate(w, f"{p}.attn.q_proj.gate", config.gate, u).softmax(-1)
        rows = []
        for t in range(length):
            y = torch.zeros_like(u[t])
            for e in probabilities[t].argsort(descending=True)[: config.top_k_attention].tolist():
                q = (u[t] @ w[f"{p}.attn.q_proj.experts.weight"][e]).view(heads, size)
                read = torch.zeros(heads, size, dtype=x.dtype)
                for h in range(heads):
                    stick = 1.0
                    for j in range(t, -1, -1):  # The last key breaks off its piece first.
                        z = torch.sigmoid(q[h] @ k[j, h] / math.sqrt(size))
                        read[h] += stick * z * v[j, h]
                        stick = stick * (1 - z)
                output = read.flatten() @ w[f"{p}.attn.q_proj.output_experts.weight"][e]
                y = y + probabilities[t, e] * output
            rows.append(y)
        x = x + torch.stack(rows)
        u = norm(w, f"{p}.ln_2", x)
        probabilities = gate(w, f"{p}.mlpf.gate", config.gate, u).softmax(-1)
        rows = []
        for t in range(length):
            y = torch.zeros_like(u[t])
            for e in probabilities[t].argsort(descending=True)[: config.top_k_mlp].tolist():
                h = u[t] @ w[f"{p}.mlpf.experts.weight"][e]
                h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                y = y + probabilities[t, e] * (h @ w[f"{p}.mlpf.output_experts.weight"][e])
            rows.append(y)
        x = x + torch.stack(rows)
    return norm(w, "transformer.ln_f", x) @ w["lm_head.weight"].T


@pytest.mark.parametrize("kind", ["mlp", "linear", "cosine"])
def test_equals_its_equations(kind):
    model = build(kind)
    tokens = tokens_of(model, 1, 8)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    expected = by_hand(w, model.config, tokens[0])
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-6, atol=1e-6)


def test_losses_are_what_they_say():
    """Minus mutual information, and entropy of the mean, of each layer; summed over layers."""
    model = build(mutual_information_coefficient=0.1, concentration_coefficient=0.2)
    out = model.loss(tokens_of(model, 3, 9))
    information = concentration = 0.0
    for r in out.routing:
        p = r.routing.router_logits.softmax(-1)
        mean = p.mean(0)
        entropy = -(mean * mean.log()).sum()
        concentration += entropy
        information += -(p * p.log()).sum() / len(p) - entropy
    assert len(out.routing) == 4
    torch.testing.assert_close(out.aux_losses["mutual_information"], information)
    torch.testing.assert_close(out.aux_losses["concentration"], concentration)
    total = out.cross_entropy + 0.1 * information + 0.2 * concentration
    torch.testing.assert_close(out.loss, total)
    assert ModuleFormerConfig.molm_350m_4b().aux_coefficients() == {}


def test_cache():
    common.check_cache(build())


def test_generate():
    common.check_generate(build().float())


@pytest.mark.parametrize("kind", ["mlp", "cosine"])
def test_gradients_flow(kind):
    common.check_gradients_flow(build(kind))


def test_compile():
    common.check_compiles(build())


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("molm_350m_4b", 4e9, 350e6),
        ("molm_700m_4b", 4e9, 700e6),
        ("molm_700m_8b", 8e9, 700e6),
    ],
)
def test_presets(preset, total, active):
    """Sizes as their names say, which leave out the embeddings."""
    config = getattr(ModuleFormerConfig, preset)()
    with torch.device("meta"):
        count = ModuleFormer(config).num_parameters()
    embeddings = 2 * config.vocab_size * config.hidden_size
    assert count["total"] - embeddings == pytest.approx(total, rel=0.15)
    assert count["active"] - embeddings == pytest.approx(active, rel=0.3)


def test_sampling_is_for_training():
    model = build(sample_top_k=1)
    tokens = tokens_of(model)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_heads must divide attention_size = 24, got 5"):
        build(num_heads=5)
    with pytest.raises(ValueError, match="one head of the hidden size"):
        build(num_heads=1, attention_size=32)


def test_concentration_gathers_the_load():
    """A few steps with the loss lower the entropy of the mean routing."""
    model = build().float()
    tokens = tokens_of(model, 4, 24)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    optimizer = torch.optim.Adam(routers, lr=0.02)

    def entropy():
        return model.loss(tokens, coefficients={"concentration": 1.0}).aux_losses["concentration"]

    before = float(entropy())
    for _ in range(20):
        optimizer.zero_grad()
        entropy().backward()
        optimizer.step()
    assert float(entropy()) < before - 0.5
