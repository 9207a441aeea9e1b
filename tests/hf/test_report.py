"""The report of what runs where, and why the rest does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moe_ops.hf

from .models import CACHE, build, tokens


def one_step(model, cache=None, **options):
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(tokens(1, 3), **{CACHE: cache}, **options)


def test_before_and_after_optimize():
    model = build("qwen2_moe")
    before = moe_ops.hf.report(model)
    assert not before
    assert before.left["model.layers.0.input_layernorm"] == (
        "a known norm; moe_ops.hf.optimize fuses it"
    )
    assert "its experts run on eager" in before.left["model.layers.0.mlp.experts"]
    done = moe_ops.hf.optimize(model)
    after = moe_ops.hf.report(model)
    assert not done.left and not after.left
    for name, how in done.items():
        assert after[name] == {"experts_implementation": "moe_ops"}.get(how, how)
    assert "model.layers.1: fused layer" in str(after)
    moe_ops.hf.restore(model)
    assert moe_ops.hf.report(model) == before


def test_what_is_left_alone_has_a_reason():
    report = moe_ops.hf.optimize(build("phimoe"))
    assert "LayerNorm is not a class of transformers" in report.left["model.layers.0"]
    model = build("olmoe", clip_qkv=8.0)
    report = moe_ops.hf.optimize(model)
    assert report["model.layers.0"] == "fused layer"
    why = "an option of its configuration changes the formula"
    assert report.left["model.layers.0.self_attn"].endswith(why)
    assert moe_ops.hf.report(model).left == report.left
    assert f"model.layers.0.self_attn: left alone (olmoe.OlmoeAttention: {why})" in str(report)


class Other(nn.Linear):
    pass


def training(model):
    model.train()
    one_step(model)


def long_prompt(model):
    with torch.no_grad():
        model(tokens(5, 20))


def hook(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    one_step(model)


def other_projection(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = Other(32, 32)
    one_step(model)


def no_cache(model):
    with torch.no_grad():
        model(tokens(1, 3), use_cache=False)


def other_attention(model):
    """A function that a user registered, whatever it computes."""
    AttentionInterface.register("of_a_user", sdpa_attention_forward_of_a_user)
    model.config._attn_implementation_internal = "of_a_user"
    one_step(model)


def sdpa_attention_forward_of_a_user(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def static_cache_at_first(model):
    one_step(model, StaticCache(config=model.config, max_cache_len=8))


def own_block(model):
    block = model.model.layers[0].mlp
    block.__class__ = type("Own", (type(block),), {})
    one_step(model)


REASONS = {
    training: "it is in training mode",
    long_prompt: "it is not inference of at most 64 tokens",
    hook: "self_attn or a part of it has hooks",
    other_projection: "a projection of self_attn is no plain linear layer",
    no_cache: "without a cache",
    other_attention: "its attention implementation is not one of transformers' own",
    static_cache_at_first: "the static cache is not initialized yet",
    own_block: "mlp has another class",
}


@pytest.mark.parametrize("use", REASONS, ids=lambda f: f.__name__)
def test_why_the_last_call_was_not_fused(use):
    model = build("qwen3_moe")
    moe_ops.hf.optimize(model)
    one_step(model)
    assert not moe_ops.hf.report(model).left
    use(model)
    left = moe_ops.hf.report(model).left["model.layers.0"]
    assert left.startswith("in its last call: ") and REASONS[use] in left
