"""JetMoE: equality with transformers, cache, losses by hand, checkpoints and what they report."""

from __future__ import annotations

import json

import pytest
import torch

from moe_ops import zoo
from moe_ops.layers import KVCache
from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig

from .lm import common
from .lm.common import change_file, sharpen, tokens_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_kv_heads": 3, "head_size": 8, "intermediate_size": 24,
    "num_experts": 5, "top_k": 2,
}  # fmt: skip


@pytest.fixture
def model():
    return sharpen(zoo.create_model("jetmoe", **SMALL)).double()


def test_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = zoo.get("jetmoe").make_config(**SMALL, norm_eps=1e-3)
    published = transformers.JetMoeConfig(**config.to_published())
    published._attn_implementation = "eager"
    hf = transformers.JetMoeForCausalLM(published)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(std=0.3)
    common.compare_with_hf(JetMoE(config), hf, tmp_path)


def test_cache(model):
    common.check_cache(model)


def test_generate(model):
    common.check_generate(model.float())


def test_gradients_flow(model):
    common.check_gradients_flow(model)


def test_compile(model):
    common.check_compiles(model)


def test_round_trip(model, tmp_path):
    common.check_round_trip(
        model, tmp_path, a_key="model.layers.1.self_attention.experts.input_linear.weight"
    )


def test_losses_are_what_they_say(model):
    """Sum over both kinds of experts of both blocks, from the routing alone."""
    tokens = tokens_of(model, 3, 11)
    out = model.loss(tokens)
    assert [r.layer for r in out.routing] == [
        "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp",
    ]  # fmt: skip
    balance = z = 0.0
    for r in out.routing:
        logits, ids = r.routing.router_logits, r.routing.topk_ids
        share = torch.tensor([(ids == e).double().mean() for e in range(5)])
        balance += 5 * (share * logits.softmax(-1).mean(0)).sum()
        z += logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(out.aux_losses["load_balancing"], balance)
    torch.testing.assert_close(out.aux_losses["router_z"], z)
    logits = model(tokens[:, :-1])
    entropy = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(out.cross_entropy, entropy)
    torch.testing.assert_close(out.loss, entropy + 0.01 * balance + 0.001 * z)

    mask = torch.rand(3, 11) < 0.6
    masked = model.loss(tokens, token_mask=mask)
    picked = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0][mask[:, :-1]]
    torch.testing.assert_close(masked.cross_entropy, picked.mean())
    with pytest.raises(ValueError, match=r"losses among .*, got balance"):
        model.loss(tokens, coefficients={"balance": 1.0})
    free = model.loss(tokens, coefficients={"router_z": 0.0})
    torch.testing.assert_close(free.loss, entropy)
    torch.testing.assert_close(free.aux_losses["router_z"], z)


def test_cache_holds_untiled_keys(model):
    """n key-value heads per token whatever K is, not K * n."""
    cache = model.new_cache()
    model(tokens_of(model, 2, 7), cache=cache)
    assert isinstance(cache[0], KVCache) and cache[0].length == 7
    assert cache[0]._buffers[0].shape[1] == SMALL["num_kv_heads"]


def test_released_config_names(tmp_path):
    """The code that came with the checkpoint calls I, E and K otherwise."""
    published = JetMoEConfig.tiny().to_published()
    for ours, theirs in (
        ("intermediate_size", "ffn_hidden_size"),
        ("num_local_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_top_k"),
    ):
        published[theirs] = published.pop(ours)
    del published["rope_parameters"]
    assert JetMoEConfig.from_published(published) == JetMoEConfig.tiny()
    assert JetMoEConfig.from_published(published, top_k=1).top_k == 1
    published["rope_scaling"] = {"type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="must be one of default, yarn, got 'linear'"):
        JetMoEConfig.from_published(published)


def test_presets():
    big = JetMoEConfig.jetmoe_8b()
    with torch.device("meta"):
        count = JetMoE(big).num_parameters()
    # 8.5 and 2.2 billion as published, the latter without the embedding.
    assert count["total"] == pytest.approx(8.52e9, rel=0.01)
    embedding = big.vocab_size * big.hidden_size
    assert count["active"] - embedding == pytest.approx(2.2e9, rel=0.04)


def test_untied(tmp_path):
    model = sharpen(zoo.create_model("jetmoe", **SMALL, tie_embeddings=False))
    common.check_round_trip(model, tmp_path, a_key="lm_head.weight")


def test_reports(model, tmp_path):
    model.float().save_pretrained(tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.mlp.bias"]

    change_file(tmp_path, change)
    with pytest.raises(ValueError, match=r"2 keys missing: model\.layers\.0\.mlp\.bias, model\.no"):
        JetMoE.from_pretrained(tmp_path)
    loose = JetMoE.from_pretrained(tmp_path, strict=False)
    assert loose.load_report.missing == ["model.layers.0.mlp.bias", "model.norm.weight"]
    assert bool((loose.norm.weight == 1).all()) and bool((loose.layers[0].mlp_bias == 0).all())
    assert torch.equal(loose.layers[1].mlp_bias, model.layers[1].mlp_bias)

    model.save_pretrained(tmp_path)
    change_file(
        tmp_path,
        lambda t: t.update(
            {
                "model.layers.0.extra.weight": torch.ones(1),
                "model.layers.0.rotary_emb.inv_freq": torch.ones(1),
                "lm_head.weight": torch.ones(1),
            }
        ),
    )
    with pytest.warns(UserWarning, match=r"1 keys unexpected: model\.layers\.0\.extra\.weight"):
        report = JetMoE.from_pretrained(tmp_path).load_report
    assert report.unexpected == ["model.layers.0.extra.weight"]
    assert report.ignored == ["lm_head.weight", "model.layers.0.rotary_emb.inv_freq"]

    change_file(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"norm\.weight must be \[32\], got \[3\]"),
    ):
        JetMoE.from_pretrained(tmp_path)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json, got none"):
        JetMoE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(JetMoEConfig.tiny().to_published()))
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or"):
        JetMoE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"JetMoEConfig: config\.json must have vocab_size"):
        JetMoE.from_pretrained(tmp_path)


def test_a_smaller_save_leaves_nothing_of_a_larger_one(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=10_000)
    model.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), r"\[B, S\] integers, got int64 of shape"),
        (lambda m: m(torch.zeros(3, 2)), "integers, got float32"),
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.int64), 1), "S >= 1"),
        (lambda m: m.generate(tokens_of(m), 1, temperature=-1.0), "temperature .* got -1"),
        (lambda m: m.generate(tokens_of(m), 1, top_k=0), "top_k .* got 0"),
        (lambda m: m.generate(tokens_of(m), 1, top_p=1.5), "top_p .* got 1.5"),
    ],
)
def test_bad_calls(model, call, words):
    with pytest.raises(ValueError, match=f"JetMoE.*{words}"):
        call(model)


def test_learns(model):
    """A repeated sentence is learned by heart in a few steps."""
    torch.manual_seed(0)
    model = zoo.create_model("jetmoe", hidden_size=32, head_size=8, intermediate_size=32)
    text = torch.tensor([list(b"the quick brown fox jumps over it ")]).repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(text)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        losses.append(loss.cross_entropy.item())
    assert losses[0] == pytest.approx(5.5, abs=0.3) and losses[-1] < 1.0, losses
