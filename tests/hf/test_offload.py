"""Models of transformers whose experts are offloaded."""

from __future__ import annotations

import pytest
import torch
from tests.hf.models import MODEL_TYPES, NUM_FFNS, build, tokens

import moe_ops
import moe_ops.hf
from moe_ops.offload import BeladyPolicy, offload_experts, record_expert_trace


def generate(model, **options) -> torch.Tensor:
    # The end of a sentence never comes: these models have no such token.
    return model.generate(tokens(), max_new_tokens=5, do_sample=False, **options)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generates_the_same(model_type, tmp_path):
    """From a file, with an oracle that fetches ahead: fewer slots than a prefill has experts."""
    want_model = build(model_type)
    moe_ops.hf.enable(want_model)
    with record_expert_trace(want_model) as recorder:
        want = generate(want_model)
    trace = recorder.trace()
    model = build(model_type)
    cache = offload_experts(
        model, 5, path=tmp_path / "experts.safetensors", policy=BeladyPolicy(trace)
    )
    with cache:
        assert cache.store.num_banks == NUM_FFNS[model_type]
        moe_ops.hf.enable(model)  # JetMoE's attention.
        assert torch.equal(generate(model), want)
        with torch.no_grad():
            x = tokens(3, 4)
            torch.testing.assert_close(model(x).logits, want_model(x).logits)
        assert "moe_ops (offloaded)" in moe_ops.hf.status(model).values()
        assert "offloaded" in moe_ops.hf.enable(model).values()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "jetmoe", "llama4_text"])
def test_quantized(model_type):
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    if model_type == "qwen3_moe":
        sizes["moe_intermediate_size"] = 32
    models = [build(model_type, **sizes) for _ in range(2)]
    for model in models:
        moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))
    offload_experts(models[1], 3)
    assert torch.equal(generate(models[1]), generate(models[0]))


def test_bfloat16():
    want = generate(build("mixtral", "moe_ops", torch.bfloat16))
    model = build("mixtral", "moe_ops", torch.bfloat16)
    offload_experts(model, 12)
    assert torch.equal(generate(model), want)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "jetmoe", "deepseek_v3"])
def test_loads_what_is_larger_than_memory(model_type, tmp_path):
    """Experts go to files while a checkpoint is read; no more than a bank is there at a time."""
    from transformers import AutoModelForCausalLM

    model = build(model_type)
    moe_ops.hf.enable(model)
    want = generate(model)
    model.save_pretrained(tmp_path / "model")
    loaded = moe_ops.hf.load_offloaded(
        AutoModelForCausalLM,
        tmp_path / "model",
        tmp_path / "experts",
        offload={"num_slots": 7},
    )
    with loaded.expert_cache as cache:
        moe_ops.hf.enable(loaded)
        assert torch.equal(generate(loaded), want)
        assert (
            cache.store.num_banks
            == NUM_FFNS[model_type]
            == len(list((tmp_path / "experts").iterdir()))
        )
    assert not any(p.is_meta for p in loaded.parameters())
    assert not hasattr(loaded.config, "quantization_config") and "is_quantized" not in vars(loaded)
    with pytest.raises(ValueError, match="must hold a bank of float experts"):
        moe_ops.hf.load_offloaded(
            AutoModelForCausalLM,
            tmp_path / "model",
            tmp_path / "experts",
            skip="*",
            offload={"num_slots": 7},
        )
