"""DeepSeekMoE: V2 and V3 against transformers, V1 against its equations, balance, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moe_ops import zoo
from moe_ops.layers import RoutingStats
from moe_ops.layers.rotary import Rope, Yarn
from moe_ops.quant import dequantize_fp8_blocks, quantize_fp8_blocks
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from ..lm import common
from ..lm.common import change_file, published_tensors, sharpen, tokens_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "dense_intermediate_size": 24, "intermediate_size": 20,
    "num_experts": 8, "top_k": 3, "num_heads": 4,
}  # fmt: skip
YARN = Yarn(4.0, 16, mscale=0.7, mscale_all_dim=0.9)
VARIANTS = {
    "v1": ("tiny_v1", {}),
    "v2": ("tiny_v2", {}),
    "v2_yarn": ("tiny_v2", {"yarn": YARN, "q_rank": None, "num_groups": 1, "num_topk_groups": 1}),
    "v3": ("tiny", {}),
    "v3_yarn": ("tiny", {"yarn": YARN, "q_rank": 16, "num_shared_experts": 2}),
    "v3_halves": ("tiny", {"rope_interleaved": False}),
}


def config_of(variant):
    preset, changes = VARIANTS[variant]
    return zoo.get("deepseek").make_config(preset, **SMALL, **changes)


def build(variant):
    return sharpen(DeepSeek(config_of(variant))).double()


@pytest.fixture(params=["v1", "v2", "v3_yarn"])
def model(request):
    return build(request.param)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "v1"])
def test_equals_transformers(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_of(variant)
    name = "DeepseekV3" if config.expert_bias else "DeepseekV2"
    published = getattr(transformers, f"{name}Config")(**config.to_published())
    published._attn_implementation = "eager"
    hf = getattr(transformers, f"{name}ForCausalLM")(published)
    with torch.no_grad():
        for key, parameter in hf.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
        for key, buffer in hf.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    common.compare_with_hf(DeepSeek(config), hf, tmp_path)


def rms(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def swiglu(w, prefix, x):
    gate, up = (w[f"{prefix}.{n}_proj.weight"] for n in ("gate", "up"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ w[f"{prefix}.down_proj.weight"].T


def v1_from_published_tensors(w, config, tokens):
    """The equations of arXiv 2401.06066 token by token, on the tensors of a checkpoint."""
    heads, size = config.num_heads, config.head_size
    x = w["model.embed_tokens.weight"][tokens]
    length = len(tokens)
    angle = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.double().cos(), angle.double().sin()

    def turn(t):
        a, b = t[..., : size // 2], t[..., size // 2 :]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        u = rms(x, w[f"{p}.input_layernorm.weight"])
        q, k, v = (u @ w[f"{p}.self_attn.{n}_proj.weight"].T for n in "qkv")
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = turn(q[:, part]) @ turn(k[:, part]).T / math.sqrt(size)
            hidden = torch.ones(length, length).triu(1).bool()
            out.append(logits.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, part])
        x = x + torch.cat(out, -1) @ w[f"{p}.self_attn.o_proj.weight"].T
        u = rms(x, w[f"{p}.post_attention_layernorm.weight"])
        if i < config.num_dense_layers:
            x = x + swiglu(w, f"{p}.mlp", u)
            continue
        rows = []
        for t in range(length):
            s = (u[t] @ w[f"{p}.mlp.gate.weight"].T).softmax(-1)
            y = swiglu(w, f"{p}.mlp.shared_experts", u[t])
            for e in s.argsort(descending=True)[: config.top_k].tolist():
                y = y + s[e] * swiglu(w, f"{p}.mlp.experts.{e}", u[t])
            rows.append(y)
        x = x + torch.stack(rows)
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_v1_equals_its_equations():
    model = build("v1")
    tokens = tokens_of(model, 1, 14)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    expected = v1_from_published_tensors(w, model.config, tokens[0])
    # The router and the angles are computed in fp32.
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_cache(model):
    common.check_cache(model.float())


@pytest.mark.parametrize("variant", ["v1", "v3"])
def test_generate(variant):
    common.check_generate(build(variant).float())


def test_gradients_flow(model):
    common.check_gradients_flow(model)


@pytest.mark.parametrize("variant", ["v2", "v3"])
def test_compile(variant):
    common.check_compiles(build(variant))


def test_round_trip(model, tmp_path):
    kind = {"deepseek": "q_proj", "deepseek_v2": "q_a_layernorm", "deepseek_v3": "kv_b_proj"}
    name = kind[model.config.model_type]
    common.check_round_trip(
        model.float(), tmp_path, a_key=f"model.layers.1.self_attn.{name}.weight"
    )
    keys = load_file(tmp_path / "one" / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in keys
    assert ("model.layers.1.mlp.gate.e_score_correction_bias" in keys) == model.config.expert_bias


# --- balance


def test_losses_are_what_they_say():
    """Expert, device and sequence balance of arXiv 2401.06066 eq. 12-17 and 2412.19437 eq. 17-20,
    with loops over devices and sequences."""
    model = build("v1")
    tokens, e, k, d = tokens_of(model, 3, 9), 8, 3, 4
    names = ("load_balancing", "device_balance", "sequence_balance")
    out = model.loss(tokens, coefficients=dict.fromkeys(names, 0.5))
    (routed,) = out.routing  # One of the two layers is dense.
    s = routed.routing.router_logits.double().softmax(-1)
    ids = routed.routing.topk_ids
    t = len(s)
    f = torch.tensor([e / (k * t) * int((ids == i).sum()) for i in range(e)])
    mean = s.mean(0)
    expert = sum(f[i] * mean[i] for i in range(e))
    device = 0.0
    for group in range(d):
        members = range(group * e // d, (group + 1) * e // d)
        device += sum(f[i] for i in members) / len(members) * sum(mean[i] for i in members)
    sequence = 0.0
    for b in range(3):
        part = slice(b * 8, (b + 1) * 8)
        for i in range(e):
            sequence += e / (k * 8) * int((ids[part] == i).sum()) * s[part, i].mean() / 3
    for name, expected in zip(names, (expert, device, sequence), strict=True):
        torch.testing.assert_close(
            out.aux_losses[name].double(), expected.double(), rtol=1e-5, atol=1e-6
        )
    total = out.cross_entropy + 0.5 * sum(out.aux_losses.values())
    torch.testing.assert_close(out.loss, total)


def test_default_losses():
    assert set(DeepSeekConfig.tiny_v1().aux_coefficients()) == {"load_balancing", "device_balance"}
    assert set(DeepSeekConfig.v3().aux_coefficients()) == {"sequence_balance"}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def test_bias_follows_the_load_of_all_micro_batches():
    model = build("v3").train()
    router = model.layers[1].mlp.router
    before = router.expert_bias.clone()
    optimizer = sgd(model)
    handle = model.balance_after(optimizer)
    batches = [tokens_of(model, 2, 17) for _ in range(3)]
    counts = torch.zeros(8, dtype=torch.int64)
    for batch in batches:
        out = model.loss(batch)
        out.loss.backward()
        counts += torch.bincount(out.routing[0].routing.topk_ids.flatten(), minlength=8)
    assert torch.equal(router.tokens_per_expert, counts)
    optimizer.step()
    step = model.config.bias_update_rate * torch.sign(counts.double().mean() - counts)
    torch.testing.assert_close(router.expert_bias, before + step.float())
    assert int(router.tokens_per_expert.sum()) == 0

    model.bias_update_rate = 0.0
    held = router.expert_bias.clone()
    model.loss(batches[0]).loss.backward()
    optimizer.step()
    assert torch.equal(router.expert_bias, held)
    model.bias_update_rate = 1.0
    handle.remove()
    model.loss(batches[0]).loss.backward()
    optimizer.step()
    assert torch.equal(router.expert_bias, held)
    model.eval()
    with torch.no_grad():
        counted = router.tokens_per_expert.clone()
        model(batches[0])
    assert torch.equal(router.tokens_per_expert, counted)


def test_bias_sums_over_ranks(monkeypatch):
    """The counts that are reduced are those of the whole step, and the sum decides."""
    model = build("v3").train()
    router = model.layers[1].mlp.router
    others = torch.tensor([900, 0, 0, 0, 0, 0, 0, 0])
    groups = []

    def all_reduce(counts, group=None):
        groups.append(group)
        counts += others

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    optimizer = sgd(model)
    model.balance_after(optimizer, group="a group")
    before = router.expert_bias.clone()
    model.loss(tokens_of(model, 2, 17)).loss.backward()
    optimizer.step()
    assert groups == ["a group"]
    moved = (router.expert_bias - before) / model.config.bias_update_rate
    torch.testing.assert_close(moved, torch.tensor([-1.0] + 7 * [1.0]), rtol=1e-3, atol=1e-3)


def test_bias_is_no_parameter_and_needs_its_option():
    model = build("v3")
    assert "layers.1.mlp.router.expert_bias" not in dict(model.named_parameters())
    with pytest.raises(ValueError, match="balance_after: config must have expert_bias"):
        build("v2").balance_after(sgd(build("v2")))


def test_bias_balances():
    """From a skewed start, steps of the bias alone even out the load."""
    model = zoo.create("deepseek", **SMALL, num_groups=1, num_topk_groups=1, group_score="max")
    sharpen(model).train()
    router = model.layers[1].mlp.router
    router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    optimizer = sgd(model)
    model.balance_after(optimizer)
    tokens = tokens_of(model, 8, 33)

    def max_violation():
        stats = RoutingStats()
        with torch.no_grad():
            routing = model.loss(tokens).routing[0].routing
        stats.update(routing.topk_ids, 8)
        return stats.max_violation()

    start = max_violation()
    router.tokens_per_expert.zero_()
    for _ in range(150):
        with torch.no_grad():
            model(tokens)
        optimizer.step()
    end = max_violation()
    assert start > 0.5 and end < start / 3, (start, end)


# --- positions and checkpoints


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    plain, stretched = Rope(64), Rope(64, yarn=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
    ratio = plain.frequencies() / stretched.frequencies()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(40.0, rel=1e-5)
    assert bool((ratio.diff() >= -1e-4).all())
    # Turns within 4096 tokens: 32 and more are kept, 1 and fewer are stretched.
    turns = 4096 * plain.frequencies() / (2 * math.pi)
    assert bool((ratio[turns > 40] == 1).all()) and bool((ratio[turns < 0.8] > 39.9).all())
    assert stretched.yarn.softmax_factor() == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert stretched.yarn.rotation_scale() == 1.0


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("deepseek_moe_16b", 16.4e9, 2.8e9),
        ("v2_lite", 15.7e9, 2.4e9),
        ("v2", 236e9, 21e9),
        ("v3", 671e9, 37e9),
    ],
)
def test_presets(preset, total, active):
    """Sizes as published; the active ones are counted there without the embedding."""
    config = getattr(DeepSeekConfig, preset)()
    with torch.device("meta"):
        model = DeepSeek(config)
    count = model.num_parameters()
    assert count["total"] == pytest.approx(total, rel=0.01)
    embedding = config.vocab_size * config.hidden_size
    assert count["active"] - embedding < 1.03 * active < 1.2 * count["active"]
    # What the published names can say survives.
    again = DeepSeekConfig.from_published(config.to_published())
    for name in ("yarn", "num_groups", "num_topk_groups", "expert_bias", "routed_scaling_factor"):
        assert getattr(again, name) == getattr(config, name)


def test_prediction_layers_are_ignored(tmp_path):
    model = build("v3").float()
    model.save_pretrained(tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.layers.12.x": torch.ones(1)}
    change_file(tmp_path, lambda t: t.update(extra))
    with pytest.warns(UserWarning, match=r"unexpected: model\.layers\.12\.x"):
        report = DeepSeek.from_pretrained(tmp_path).load_report
    assert report.ignored == ["model.layers.2.eh_proj.weight"]


def test_fp8_weights_are_read(tmp_path):
    """Blocks of 128 x 128 with `weight_scale_inv`, as V3 is published."""
    model = build("v3").float()
    model.save_pretrained(tmp_path)
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    expected = {}

    def change(tensors):
        q, scale = quantize_fp8_blocks(tensors[key])
        tensors[key], tensors[f"{key}_scale_inv"] = q, scale
        expected["w"] = dequantize_fp8_blocks(q, scale, dtype=torch.bfloat16)

    change_file(tmp_path, change)
    loaded = DeepSeek.from_pretrained(tmp_path)
    assert loaded.load_report.unexpected == []
    assert torch.equal(loaded.layers[1].mlp.experts.w_down[3], expected["w"].float())
    error = (loaded.layers[1].mlp.experts.w_down - model.layers[1].mlp.experts.w_down).norm()
    assert 0 < error < 0.05 * model.layers[1].mlp.experts.w_down.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type must be one of deepseek, .*got 'llama'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
    ],
)
def test_configs_of_something_else(change, words):
    with pytest.raises(ValueError, match=f"DeepSeekConfig: {words}"):
        DeepSeekConfig.from_published({**DeepSeekConfig.tiny().to_published(), **change})
