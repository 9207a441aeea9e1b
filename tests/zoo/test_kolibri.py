"""Kolibri-1 against transformers, and what every language model is tested for."""

from __future__ import annotations

import pytest
import torch

from moe_ops import zoo
from moe_ops.layers import update_expert_bias
from moe_ops.zoo.kolibri import KolibriConfig

from .lm import common
from .lm.common import sharpen

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 3,
    "head_size": 8,
    "window": 5,
    "num_experts": 6,
}


def build(**changes):
    torch.manual_seed(0)
    return sharpen(zoo.create_model("kolibri", **SMALL | changes)).double()


def test_is_a_language_model(tmp_path):
    model = build()
    common.check_cache(model)
    common.check_generate(model)
    key = "model.layers.0.moe.router.expert_bias"
    common.check_round_trip(model.float(), tmp_path, a_key=key)


@pytest.mark.parametrize("full_every", [0, 2])
@pytest.mark.parametrize("renormalize", [False, True])
def test_equals_transformers(full_every, renormalize, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    model = build(full_every=full_every, renormalize=renormalize)
    torch.manual_seed(1)
    config = transformers.Kolibri1Config(**model.config.to_published())
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for name, buffer in hf.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_()
    common.compare_with_hf(model, hf, tmp_path)


def test_a_window_hides_what_is_before_it():
    model = build(num_layers=1, full_every=0).eval()
    tokens = torch.randint(64, (1, 12))
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 64
    with torch.no_grad():
        same = model(tokens).isclose(model(changed), rtol=1e-9, atol=1e-9).all(-1)[0]
    assert not same[:5].any() and same[5:].all()


def test_its_bias_is_trained_by_loads():
    model = build().train()
    model.loss(torch.randint(64, (2, 12))).loss.backward()
    before = model.layers[0].mlp.router.expert_bias.clone()
    update_expert_bias(model, rate=0.01)
    assert not torch.equal(model.layers[0].mlp.router.expert_bias, before)


def test_config_of_kolibri_1():
    config = zoo.get("kolibri").make_config("kolibri_1")
    assert KolibriConfig.from_published(config.to_published()) == config
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types must have full_attention at regular"):
        KolibriConfig.from_published({**config.to_published(), "layer_types": kinds})
