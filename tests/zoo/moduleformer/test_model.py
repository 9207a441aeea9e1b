"""ModuleFormer against its equations, growing with frozen modules, pruning, published keys."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from moe_ops import zoo
from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from ..lm import common
from ..lm.common import change_file, published_tensors, sharpen, tokens_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "attention_size": 24, "num_heads": 3,
    "intermediate_size": 20, "gate_size": 12, "num_attention_experts": 4, "num_mlp_experts": 6,
}  # fmt: skip


def build(gate="mlp", **changes):
    return sharpen(zoo.create("moduleformer", **{**SMALL, "gate": gate, **changes})).double()


def norm(w, name, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gate(w, name, kind, u):
    if kind == "linear":
        return u @ w[f"{name}.w_gate.0.weight"].T
    if kind == "mlp":
        z = u @ w[f"{name}.w_gate.0.weight"].T + w[f"{name}.w_gate.0.bias"]
        return (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ w[f"{name}.w_gate.3.weight"].T
    z = u @ w[f"{name}.w_gate.weight"].T
    rows = w[f"{name}.expert_centroids"]
    cosine = (z @ rows.T) / (z.norm(dim=-1)[:, None] * rows.norm(dim=-1))
    return cosine * w[f"{name}.temperature"].exp()


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
    ("kind", "key"),
    [
        ("mlp", "transformer.h.1.mlpf.gate.w_gate.3.weight"),
        ("linear", "transformer.h.0.attn.q_proj.gate.w_gate.0.weight"),
        ("cosine", "transformer.h.1.attn.q_proj.gate.temperature"),
    ],
)
def test_round_trip(kind, key, tmp_path):
    model = build(kind).float()
    common.check_round_trip(model, tmp_path, a_key=key)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    # Inputs before outputs.
    assert tensors["transformer.h.0.attn.q_proj.experts.weight"].shape == (4, 32, 24)
    assert tensors["transformer.h.0.mlpf.output_experts.weight"].shape == (6, 20, 32)


def test_buffers_of_published_checkpoints_are_ignored(tmp_path):
    model = build().float()
    model.save_pretrained(tmp_path)
    names = [f"transformer.h.{i}.attn.{n}" for i in (0, 1) for n in ("cum_weight", "mask")]
    change_file(tmp_path, lambda t: t.update({n: torch.ones(2) for n in names}))
    report = ModuleFormer.from_pretrained(tmp_path).load_report
    assert report.ignored == names and report.unexpected == []


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


# --- inserting experts


@pytest.mark.parametrize("freeze", [True, False])
def test_inserting(freeze):
    """Sizes, the config, and what is trained afterwards."""
    model = build()
    model.insert_experts(attention=1, mlp=2, init="zero_output", freeze=freeze)
    assert model.config.num_attention_experts == 5 and model.config.num_mlp_experts == 8
    for block in model.layers:
        assert block.attention.w_query.shape[0] == block.attention.router.num_experts == 5
        assert block.mlp.experts.w_down.shape[0] == block.mlp.router.num_experts == 8
        assert bool((block.mlp.experts.w_down[6:] == 0).all())
        assert bool((block.attention.w_output[4:] == 0).all())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if freeze:
        assert trained == set(model.frozen_rows) and len(trained) == 2 * 6
        assert "layers.0.mlp.router.stem.weight" not in trained
    else:
        assert trained == {name for name, _ in model.named_parameters()}
        assert not model.frozen_rows


def test_old_experts_stay_while_new_ones_learn():
    """Bitwise, with momentum, adaptive steps and weight decay."""
    model = build().float()
    tokens = tokens_of(model, 4, 24)
    model.insert_experts(attention=1, mlp=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    handle = model.hold_frozen(optimizer)
    first = None
    for _ in range(12):
        optimizer.zero_grad()
        out = model.loss(tokens)
        (out.loss + 1e-3 * model.new_rows_penalty()).backward()
        optimizer.step()
        first = out.cross_entropy.item() if first is None else first
    for name, p in model.named_parameters():
        if name in model.frozen_rows:
            old = len(model.frozen_rows[name].kept)
            assert torch.equal(p[:old], before[name][:old]), name
            assert not torch.equal(p[old:], before[name][old:]), name
        else:
            assert torch.equal(p, before[name]), name
    assert model.loss(tokens).cross_entropy.item() < first
    # The old model is still there: take the old experts and it is what it was.
    handle.remove()
    model.unfreeze()
    assert all(p.requires_grad for p in model.parameters()) and not model.frozen_rows


def test_the_old_model_is_inside_the_grown_one():
    model = build()
    tokens = tokens_of(model)
    before = model(tokens)
    model.insert_experts(attention=2, mlp=3)
    frequencies = {}
    for i in range(2):
        frequencies[f"layers.{i}.attention"] = torch.tensor([1.0] * 4 + [0.0] * 2)
        frequencies[f"layers.{i}.mlp"] = torch.tensor([1.0] * 6 + [0.0] * 3)
    model.prune(frequencies, 0.5)
    torch.testing.assert_close(model(tokens), before)
    assert model.config == build().config


def test_bad_insertions():
    model = build()
    with pytest.raises(ValueError, match="not both 0, got 0 and 0"):
        model.insert_experts()
    with pytest.raises(ValueError, match="none"):
        model.new_rows_penalty()


# --- pruning


def test_frequencies_are_shares_of_tokens():
    model = build().train()
    batches = [tokens_of(model, 2, 9), tokens_of(model, 1, 30)]
    found = model.expert_frequencies(batches)
    assert model.training and set(found) == {
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("attention", "mlp")
    }
    model.eval()
    for name, frequency in found.items():
        counts = torch.zeros(len(frequency))
        for tokens in batches:
            for r in model(tokens, return_routing=True).routing:
                if r.layer == name:
                    counts += torch.bincount(r.routing.topk_ids.flatten(), minlength=len(counts))
        torch.testing.assert_close(frequency, counts.double() / 48)
        assert float(frequency.sum()) == pytest.approx(2)


def test_pruning(tmp_path):
    model = build()
    tokens = tokens_of(model)
    frequencies = {
        "layers.0.mlp": torch.tensor([0.5, 0.0, 0.2, 0.05, 0.9, 0.35]),
        "layers.1.attention": torch.tensor([0.0, 0.01, 0.02, 0.0]),
    }
    masks = {
        "layers.0.mlp": torch.tensor([True, False, True, False, True, True]),
        "layers.1.attention": torch.tensor([False, True, True, False]),
    }
    # What the model says when the dropped experts may not be used.
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "expert_mask": mask}),
            with_kwargs=True,
        )
        for name, mask in masks.items()
    ]
    expected = model(tokens)
    for handle in handles:
        handle.remove()
    kept = model.prune(frequencies, 0.1)
    # All are rare in the second layer: the K most used stay.
    assert kept == {"layers.0.mlp": [0, 2, 4, 5], "layers.1.attention": [1, 2]}
    torch.testing.assert_close(model(tokens), expected)
    assert model.config.experts_of_layers == ((4, 4), (2, 6))
    assert model.config.num_mlp_experts == 6

    model = model.float()
    model.save_pretrained(tmp_path)
    again = ModuleFormer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    common.check_gradients_flow(again)


@pytest.mark.parametrize(
    ("frequencies", "threshold", "words"),
    [
        ({}, 2.0, r"threshold must be in \[0, 1\], got 2.0"),
        ({"layers.2.mlp": torch.ones(6)}, 0.1, r"got layers\.2\.mlp"),
        ({"layers.0.mlp": torch.ones(5)}, 0.1, r"must be \[6\], got \[5\]"),
    ],
)
def test_bad_pruning(frequencies, threshold, words):
    with pytest.raises(ValueError, match=f"ModuleFormer.prune: .*{words}"):
        build().prune(frequencies, threshold)


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


def test_sampling_is_for_training():
    model = build(sample_top_k=1)
    tokens = tokens_of(model)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_type": "hash"}, "gate_type must be one of mlp, linear, gmm, got 'hash'"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new', got 'relu'"),
    ],
)
def test_configs_of_something_else(change, words):
    published = ModuleFormerConfig.tiny().to_published()
    with pytest.raises(ValueError, match=f"ModuleFormerConfig: {words}"):
        ModuleFormerConfig.from_published({**published, **change})


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_heads must divide attention_size = 24, got 5"):
        build(num_heads=5)
    with pytest.raises(ValueError, match="one head of the hidden size"):
        build(num_heads=1, attention_size=32)
