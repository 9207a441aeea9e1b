"""BAM against its equations on published-style tensors, and its start from dense models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_ops import zoo
from moe_ops.zoo.bam import BAM, BAMConfig

from .lm import common
from .lm.common import published_tensors, sharpen, tokens_of
from .lm.llama import attention, rms_norm, swiglu

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "head_size": 8}
FORMS = [
    {},
    {"attention": "shared_kv"},
    {"attention": "dense"},
    {"attention_top_k": 1},
    {"attention": "shared_kv", "attention_top_k": 2, "top_k": 2},
]


def build(seed: int = 0, **changes) -> BAM:
    torch.manual_seed(seed)
    return sharpen(zoo.create_model("bam", **{**SMALL, "num_experts": 3, **changes})).double()


def by_hand(w: dict[str, Tensor], config: BAMConfig, tokens: Tensor) -> Tensor:
    """Parallel blocks; attention of each expert in full, then mixed; networks token by token."""
    x, experts = w["model.embed_tokens.weight"][tokens], config.num_experts
    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        u = rms_norm(x, w[f"{p}.input_layernorm.weight"])
        y = torch.zeros_like(x)
        if config.attention == "dense":
            y = attention(w, f"{p}.self_attn", u, config.num_heads)
        else:
            prob = (u @ w[f"{p}.self_attn.router.weight"].T).softmax(-1)
            if config.attention_top_k is not None:
                least = prob.topk(config.attention_top_k, dim=-1).values[:, -1:]
                prob = prob * (prob >= least)
            for e in range(experts):
                own = f"{p}.self_attn.experts.{e}"
                parts = {
                    f"one.{n}_proj.weight": w.get(
                        f"{own}.{n}_proj.weight", w.get(f"{p}.self_attn.{n}_proj.weight")
                    )
                    for n in "qkvo"
                }
                y = y + prob[:, e : e + 1] * attention(parts, "one", u, config.num_heads)
        prob = (u @ w[f"{p}.mlp.router.weight"].T).softmax(-1)
        rows = []
        for t in range(len(tokens)):
            row = torch.zeros_like(u[t])
            for e in prob[t].argsort(descending=True)[: config.top_k].tolist():
                row = row + prob[t, e] * swiglu(w, f"{p}.mlp.experts.{e}", u[t])
            rows.append(row)
        x = x + y + torch.stack(rows)
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_equals_its_equations(changes):
    model = build(**changes)
    tokens = tokens_of(model, 1, 11)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    expected = by_hand(w, model.config, tokens[0])
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["expert_kv", "shared_kv", "dense"])
def test_starts_from_dense_models(form):
    dense = [build(seed, num_experts=1, num_kv_heads=2) for seed in range(3)]
    model = BAM.from_dense(dense, attention=form)
    assert model.config.num_experts == 3
    tokens = tokens_of(model, 1, 9)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    theirs = [{k: t.detach() for k, t in published_tensors(m).items()} for m in dense]
    for key in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        torch.testing.assert_close(w[key], sum(t[key] for t in theirs) / 3)
    p = "model.layers.1"
    for e, t in enumerate(theirs):
        assert torch.equal(w[f"{p}.mlp.experts.{e}.up_proj.weight"], t[f"{p}.mlp.up_proj.weight"])
    if form == "dense":
        key = f"{p}.self_attn.k_proj.weight"
        torch.testing.assert_close(w[key], sum(t[key] for t in theirs) / 3)
        return
    torch.testing.assert_close(model(tokens)[0], by_hand(w, model.config, tokens[0]))
    # One layer alone: attention of a dense model, where the router is sure of it.
    layer, rope = model.layers[1].attention, model.rope
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    one = layer(x, topk_ids=torch.full((7, 1), 2), topk_weights=torch.ones(7, 1).double())
    expected = dense[2].layers[1].attention(x, rope.rotation(0, 7))
    if form == "expert_kv":
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.allclose(one, expected, rtol=1e-2, atol=1e-2)


def test_equal_dense_models_make_equal_attention():
    dense = build(num_experts=1)
    for form in ("expert_kv", "shared_kv"):
        model = BAM.from_dense([dense] * 3, attention=form)
        x = torch.randn(1, 7, 32, dtype=torch.float64)
        expected = dense.layers[0].attention(x, dense.rope.rotation(0, 7))
        torch.testing.assert_close(model.layers[0].attention(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [*FORMS[:3], {"num_experts": 1}], ids=str)
def test_is_a_language_model(changes, tmp_path):
    model = build(**changes)
    common.check_cache(model)
    common.check_gradients_flow(model)
    common.check_round_trip(model.float(), tmp_path, a_key="model.layers.0.input_layernorm.weight")


def test_generates_and_compiles():
    model = build()
    common.check_generate(model)
    common.check_compiles(model.float())


def test_losses_are_of_layers_that_choose():
    tokens = torch.randint(64, (2, 9))
    assert build(num_experts=1).loss(tokens).aux_losses == {}
    names = [r.layer for r in build().loss(tokens).routing]
    assert names == ["layers.0.mlp", "layers.1.mlp"]
    names = [r.layer for r in build(attention_top_k=1).loss(tokens).routing]
    assert names[:2] == ["layers.0.attention", "layers.0.mlp"] and len(names) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build(attention="sparse"), "attention must be one of expert_kv"),
        (lambda: BAM.from_dense([build(num_experts=1)]), "two or more of one config, got 1"),
        (lambda: BAM.from_dense([build(), build()]), "with num_experts = 1, got 3"),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
