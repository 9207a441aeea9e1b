"""The dense model against transformers, and what every language model is tested for."""

from __future__ import annotations

import pytest
import torch

from moe_ops import zoo
from moe_ops.zoo.llama import LlamaConfig

from .lm import common
from .lm.common import sharpen

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "head_size": 8}


def build(**changes):
    torch.manual_seed(0)
    return sharpen(zoo.create_model("llama", **SMALL, **changes)).double()


def test_is_a_language_model(tmp_path):
    model = build(num_kv_heads=2)
    common.check_cache(model)
    common.check_generate(model)
    common.check_gradients_flow(model)
    key = "model.layers.0.mlp.gate_proj.weight"
    common.check_round_trip(model.float(), tmp_path, a_key=key)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_transformers(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(num_kv_heads=2, tie_embeddings=tied)
    torch.manual_seed(1)
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            **{**model.config.to_published(), "pad_token_id": 0, "rms_norm_eps": 1e-6}
        )
    )
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    common.compare_with_hf(model, hf, tmp_path)


def test_config_of_tinyllama():
    config = zoo.get("llama").make_config("tinyllama_1b")
    assert LlamaConfig.from_published(config.to_published()) == config
    with torch.device("meta"):
        model = zoo.create_model("llama", "tinyllama_1b")
    assert model.num_parameters()["total"] == 1_100_048_384


def test_refuses_what_it_lacks():
    published = LlamaConfig().to_published()
    with pytest.raises(ValueError, match="attention_bias must be False, got True"):
        LlamaConfig.from_published({**published, "attention_bias": True})
