"""Published checkpoints of DeepSeek."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import moe_ops
from moe_ops.quant import dequantize_fp8_blocks, quantize_fp8_blocks
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from ..lm import common
from ..lm.common import change_file
from .common import build


def test_round_trip(model, tmp_path):
    kind = {"deepseek": "q_proj", "deepseek_v2": "q_a_layernorm", "deepseek_v3": "kv_b_proj"}
    name = kind[model.config.model_type]
    common.check_round_trip(
        model.float(), tmp_path, a_key=f"model.layers.1.self_attn.{name}.weight"
    )
    keys = load_file(tmp_path / "one" / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in keys
    assert ("model.layers.1.mlp.gate.e_score_correction_bias" in keys) == model.config.expert_bias


def test_prediction_layers_are_ignored(tmp_path):
    model = build("v3").float()
    model.save_pretrained(tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.layers.12.x": torch.ones(1)}
    change_file(tmp_path, lambda t: t.update(extra))
    with pytest.warns(UserWarning, match=r"unexpected: model\.layers\.12\.x"):
        report = DeepSeek.from_pretrained(tmp_path).load_report
    assert report.ignored == ["model.layers.2.eh_proj.weight"]


def test_quantized_experts_are_not_written_without_their_scales(tmp_path):
    model = moe_ops.quantize(build("v3").float(), moe_ops.Int8WeightConfig())
    with pytest.raises(ValueError, match=r"w_gate_up must be of floats, got torch\.int8"):
        model.save_pretrained(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


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
