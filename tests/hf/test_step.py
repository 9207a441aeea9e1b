"""Decoder layers on few tokens, in few calls: used where it can be, and the same as ever."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tests.helpers.quantized import weight_config
from torch import nn
from transformers import DynamicCache

import moe_ops.hf
from moe_ops.hf.decode import cache_room, step
from moe_ops.hf.decode.stock import take_stock
from moe_ops.hf.models.attention import LatentAttention

from .models import CACHE, MODEL_TYPES, build, skip_unknown_router, tokens
from .test_optimize import GREEDY, padded

# Models whose attention is that of an op.
LATENT = ("deepseek_v2", "deepseek_v3")
ATTENDED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "gpt_oss")
ATTENDED += LATENT
# Those whose layers have another form altogether.
OTHERS = ("phimoe", "jetmoe", "dbrx", "llama4_text")


@pytest.fixture
def calls(monkeypatch):
    """The number of tokens of each call of the ops."""
    lengths = []

    def counting(op):
        def count(x, *args, **kwargs):
            lengths.append(x.shape[1])
            return op(x, *args, **kwargs)

        return count

    for name in ("attention_decode", "mla_decode"):
        monkeypatch.setattr(step, name, counting(getattr(step, name)))
    return lengths


def pair(model_type="qwen3_moe", **overrides):
    plain, model = build(model_type, **overrides), build(model_type, **overrides)
    moe_ops.hf.optimize(model)
    return plain, model


def both(models, function):
    with torch.no_grad():
        results = [function(m) for m in models]
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
    return results


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_known_layers(model_type):
    skip_unknown_router(model_type)
    known = list(take_stock(build(model_type)).layers.values())
    assert len(known) == (0 if model_type in OTHERS else 2)
    for parts in known:
        assert (parts.attention is not None) == (model_type in ATTENDED)
        is_latent = parts.attention and isinstance(parts.attention.entry, LatentAttention)
        assert is_latent == (model_type in LATENT)
        assert not parts.left
    if known:
        dense = model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe")
        assert (known[0].network is not None) == dense == (known[0].block is None)
        assert known[1].block is not None and known[1].network is None
        assert (known[1].shared is not None) == (dense or model_type == "qwen2_moe")


@pytest.mark.parametrize("model_type", ATTENDED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_step_of_every_layer(model_type, attention, calls):
    models = pair(model_type)
    for m in models:
        if not (model_type == "gpt_oss" and attention == "sdpa"):
            m.set_attn_implementation(attention)
    for batch in ({"input_ids": tokens(1, 5)}, padded()):
        calls.clear()
        # Longer than gpt-oss's window of 8.
        want, got = (m.generate(**{**batch, **GREEDY}) for m in models)
        assert torch.equal(got, want)
        steps = got.shape[1] - batch["input_ids"].shape[1]
        assert len(calls) == 2 * steps


def test_long_prompts_go_the_old_way(calls):
    models = pair(max_position_embeddings=256)
    ids = tokens(2, 40)  # 80 tokens, and then one of each sequence.
    both(models, lambda m: m(ids).logits)
    assert not calls
    want, got = (m.generate(ids, **GREEDY) for m in models)
    assert torch.equal(got, want)
    assert set(calls) == {1}


def test_a_cache_that_is_cut_copied_and_reordered():
    models = pair()
    ids = tokens(2, 12)

    def run(m):
        cache, outputs = DynamicCache(config=m.config), []
        for i in range(6):
            outputs.append(m(ids[:, i : i + 1], **{CACHE: cache}).logits)
        other = copy.deepcopy(cache)
        outputs.append(m(ids[:, 6:8], **{CACHE: cache}).logits)
        outputs.append(m(ids[:, 9:10], **{CACHE: other}).logits)
        before = [layer.keys for layer in cache.layers]
        cache.crop(-3)
        outputs.append(m(ids[:, 5:7], **{CACHE: cache}).logits)
        cache.reorder_cache(torch.tensor([1, 0]))
        outputs.append(m(ids[:, 7:8], **{CACHE: cache}).logits)
        outputs += [layer.keys for layer in (*cache.layers, *other.layers)]
        return outputs, before  # Tensors that somebody holds stay as they were.

    both(models, run)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_branches_of_a_cache_that_was_copied_shallowly(model_type):
    """Copies share tensors until one of them goes on, as transformers never writes into these."""
    models, ids = pair(model_type), tokens(1, 24)

    def branch(cache):
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        return other

    def run(m):
        cache, outputs = DynamicCache(config=m.config), []
        for i in range(5):
            m(ids[:, i : i + 1], **{CACHE: cache})
        branches = [cache, branch(cache), branch(cache)]
        for step_ in range(4):
            for n, each in enumerate(branches):
                token = ids[:, 6 + 4 * n + step_ : 7 + 4 * n + step_]
                outputs.append(m(token, **{CACHE: each}).logits)
        late = branch(branches[1])
        outputs.append(m(ids[:, 20:22], **{CACHE: late}).logits)
        outputs += [m(ids[:, 23:24], **{CACHE: each}).logits for each in (*branches, late)]
        kept = [layer.keys for each in (*branches, late) for layer in each.layers]
        return outputs + kept

    both(models, run)


def test_only_one_thread_goes_on_in_shared_buffers():
    buffers = cache_room._Buffers(torch.empty(1, 1, 64, 2), torch.empty(1, 1, 64, 2), 3)
    gate, won = threading.Barrier(8), []

    def claim():
        gate.wait()
        if buffers.claim(3, 4):
            won.append(1)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and not buffers.claim(4, 65) and buffers.claim(4, 64)


def test_growing_past_the_room(monkeypatch):
    monkeypatch.setattr(cache_room, "_LEAST_ROOM", 2)
    models = pair(max_position_embeddings=128)
    want, got = (m.generate(tokens(2, 3), **{**GREEDY, "max_new_tokens": 40}) for m in models)
    assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_inference_mode(model_type, calls):
    """Steps are fused there too, and a cache may begin in one mode and go on in the other."""
    models, ids = pair(model_type), tokens(1, 12)

    def run(m, modes):
        cache, outputs = DynamicCache(config=m.config), []
        for i, mode in enumerate(modes):
            with mode():
                outputs.append(m(ids[:, i : i + 1], **{CACHE: cache}).logits.clone())
        return outputs

    for modes in ([torch.inference_mode] * 4, [torch.inference_mode, torch.no_grad] * 3):
        calls.clear()
        both(models, lambda m, modes=modes: run(m, modes))
        assert len(calls) == 2 * len(modes)
    models[1].train()
    models[1](ids).logits.sum().backward()  # Nothing that inference mode kept is in the way.


def test_outputs_beside_the_logits(calls):
    models = pair()
    ids = tokens(1, 6)

    def run(m, **wanted):
        cache = DynamicCache(config=m.config)
        m(ids, **{CACHE: cache})
        return m(ids[:, :1], **{CACHE: cache}, **wanted)

    for name, field in (
        ("output_hidden_states", "hidden_states"),
        ("output_router_logits", "router_logits"),
        ("output_attentions", "attentions"),
    ):
        results = both(models, lambda m, n=name, f=field: getattr(run(m, **{n: True}), f))
        assert len(results[0]) >= 2
    calls.clear()
    both(models, lambda m: run(m).logits)
    assert len(calls) == 4, "transformers' hooks stay, and nobody waits for them"


@pytest.mark.parametrize("name", ["self_attn", "self_attn.q_proj", "self_attn.q_norm", "mlp.gate"])
def test_hooks_are_called(name):
    _, model = pair()
    seen = []
    layer = model.model.layers[1]
    handle = layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    model.generate(tokens(1, 4), **GREEDY)
    assert len(seen) == GREEDY["max_new_tokens"]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    seen.clear()
    with torch.no_grad():
        model(tokens(1, 4))
    assert layer.get_submodule(name) in seen
    handle.remove()


def test_what_takes_the_place_of_a_part(calls):
    models = pair("mixtral")

    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    for m in models:
        attention = m.model.layers[0].self_attn
        attention.v_proj = Doubled(attention.v_proj)
        gate = m.model.layers[1].mlp.gate
        gate.forward = lambda x, gate=gate: type(gate).forward(gate, x * 0.5)
    both(models, lambda m: m(tokens()).logits)
    assert len(calls) == 1, "one has another part, the other another forward in its block"


def test_changed_parameters_are_read():
    models = pair("mixtral")
    ids = tokens(1, 5)
    both(models, lambda m: m(ids).logits)
    for m in models:
        attention = m.model.layers[0].self_attn
        attention.q_proj.weight = nn.Parameter(attention.q_proj.weight * 0.5)
        with torch.no_grad():
            m.model.layers[1].input_layernorm.weight.mul_(1.5)
    both(models, lambda m: m(ids).logits)
    for m in models:
        m.to(torch.float64)
    both(models, lambda m: m(ids).logits)


def test_training_goes_the_old_way(calls):
    models = pair("mixtral", attention_dropout=0.5)
    for m in models:
        m.train()
        torch.manual_seed(0)
    ids = tokens(1, 5)
    with torch.no_grad():
        models[1](ids)
    models[1].eval()(ids, labels=ids).loss.backward()
    assert not calls


def test_other_classes_are_left_alone():
    model = build("qwen3_moe")
    first, second = model.model.layers
    attend, forward = type(first.self_attn).forward, type(second).forward

    class Halved(type(first.self_attn)):
        def forward(self, *args, **kwargs):
            y, weights = attend(self, *args, **kwargs)
            return y / 2, weights

    class Scaled(type(second)):
        def forward(self, hidden_states, **kwargs):
            return forward(self, hidden_states * 2, **kwargs)

    class Rescaled(type(first.mlp)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 0.5

    first.self_attn.__class__ = Halved
    stock = take_stock(model)
    parts = stock.layers["model.layers.0"]
    assert parts.attention is None and parts.block is not None
    assert "Halved is not a class of transformers" in stock.left["model.layers.0.self_attn"]
    first.mlp.__class__ = Rescaled
    second.__class__ = Scaled
    assert not take_stock(model).layers
    model = build("qwen3_moe")
    model.model.layers[0].forward = lambda *args, **kwargs: None
    stock = take_stock(model)
    assert list(stock.layers) == ["model.layers.1"]
    assert "has a forward of its own" in stock.left["model.layers.0"]


def test_half_precision_and_codes(calls):
    plain = build("qwen3_moe", dtype=torch.bfloat16, hidden_size=64, moe_intermediate_size=32)
    ids = tokens(1, 5)
    for weights in (None, "int8", "int4"):
        model = copy.deepcopy(plain)
        moe_ops.hf.optimize(model, quantization=weight_config(weights, 32))
        calls.clear()
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, **{CACHE: cache})
            got = model(ids[:, :1], **{CACHE: cache}).logits
            assert len(calls) == 4
            want = plain(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:]
        assert (got - want).float().norm() < 0.3 * want.float().norm()


@pytest.mark.parametrize(
    "overrides", [{"q_lora_rank": None}, {"attention_bias": True}, {"rope_interleave": False}]
)
def test_latent_attention_of_other_kinds(overrides, calls):
    models = pair("deepseek_v3", **overrides)
    want, got = (m.generate(**{**padded(), **GREEDY}) for m in models)
    assert torch.equal(got, want)
    assert calls


@pytest.mark.parametrize("model_type", LATENT)
def test_latents_are_kept_as_the_model_keeps_them(model_type, calls):
    """A long prompt goes the old way and the steps after it do not, in caches of both kinds."""
    models = pair(model_type, max_position_embeddings=128)
    ids = tokens(2, 40)
    for kind in ("dynamic", "static"):
        calls.clear()
        want, got = (
            m.generate(ids, cache_implementation=kind, **GREEDY, disable_compile=True)
            for m in models
        )
        assert torch.equal(got, want)
        assert set(calls) == {1}

    def kept(m):
        cache = DynamicCache(config=m.config)
        for part in (ids, ids[:, :1], ids[:, :40]):
            m(part, **{CACHE: cache})
        return [t for layer in cache.layers for t in (layer.keys, layer.values)]

    both(models, kept)


def test_long_prompts_of_latent_attention_keep_no_scores(calls):
    """Keys have more features than values; padded sequences, and a second part of a prompt."""
    models = pair("deepseek_v3", max_position_embeddings=256)
    for m in models:
        m.set_attn_implementation("sdpa")
    ids = tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0

    def in_two_parts(m):
        cache = DynamicCache(config=m.config)
        outs = [m(ids[:, :40], **{CACHE: cache}).logits, m(ids[:, 40:], **{CACHE: cache}).logits]
        return [*outs, m(ids, attention_mask=mask).logits[1, 7:]]

    both(models, in_two_parts)
    for m, kernel in zip(models, ("attention_math", "flash_attention_for_cpu"), strict=True):
        with torch.no_grad(), torch.profiler.profile() as recorded:
            m(ids)
        names = {event.key for event in recorded.key_averages()}
        prefix = "aten::_scaled_dot_product_"
        assert {n for n in names if n.startswith(prefix)} == {prefix + kernel}


def test_codes_of_latent_attention(calls):
    ids = tokens(1, 5)
    for weights, group_size in (("int8", None), ("int4", 32)):
        model = build("deepseek_v3", hidden_size=64, moe_intermediate_size=32)
        report = moe_ops.hf.optimize(model, quantization=weight_config(weights, group_size))
        assert report["model.layers.0.self_attn.kv_b_proj"] == "few rows"
        assert report["model.layers.0.self_attn.kv_a_proj_with_mqa"].startswith(weights)
        calls.clear()
        with torch.no_grad():
            got = model(ids).logits
            assert len(calls) == 2
            handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
            want = model(ids).logits
            handle.remove()
        assert len(calls) == 2
        assert (got - want).norm() < 0.05 * want.norm()
