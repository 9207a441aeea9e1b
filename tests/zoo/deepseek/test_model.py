"""DeepSeekMoE: V2 and V3 against transformers, V1 against its equations."""

from __future__ import annotations

import pytest
import torch

from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from ..lm import common
from ..lm.common import published_tensors, tokens_of
from ..lm.llama import attention, rms_norm, swiglu
from .common import VARIANTS, build, config_of


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


def v1_from_published_tensors(w, config, tokens):
    """The equations of arXiv 2401.06066 token by token, on the tensors of a checkpoint."""
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        u = rms_norm(x, w[f"{p}.input_layernorm.weight"])
        x = x + attention(w, f"{p}.self_attn", u, config.num_heads)
        u = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"])
        if i < config.num_dense_layers:
            x = x + swiglu(w, f"{p}.mlp", u)
            continue
        rows = []
        for t in range(len(tokens)):
            s = (u[t] @ w[f"{p}.mlp.gate.weight"].T).softmax(-1)
            y = swiglu(w, f"{p}.mlp.shared_experts", u[t])
            for e in s.argsort(descending=True)[: config.top_k].tolist():
                y = y + s[e] * swiglu(w, f"{p}.mlp.experts.{e}", u[t])
            rows.append(y)
        x = x + torch.stack(rows)
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


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
