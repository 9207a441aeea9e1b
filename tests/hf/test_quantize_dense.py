"""Whole models in few bits: experts in one format and dense layers in another, on disk too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moe_ops.hf
from moe_ops.cli.app import app
from moe_ops.hf import MoeOpsConfig
from moe_ops.quant import QuantizedExperts
from moe_ops.quant.stored_linear import StoredLinear

from .models import CONFIGS, build, tokens

INT4, INT8 = moe_ops.Int4WeightConfig(32), moe_ops.Int8WeightConfig()
TYPES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jetmoe", "dbrx"]


def make(model_type, **options):
    sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 32)
    wide = {k: v for k, v in sizes.items() if k in CONFIGS[model_type]}
    if model_type == "dbrx":
        wide = {"ffn_config": {**CONFIGS["dbrx"]["ffn_config"], "ffn_hidden_size": 32}}
    return build(model_type, **wide, **options)


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # Of a mapped file, tensors begin anywhere.
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def formats(model):
    found = {n: m.format.label for n, m in model.named_modules() if isinstance(m, StoredLinear)}
    return found | {
        n: m.format_name for n, m in model.named_modules() if isinstance(m, QuantizedExperts)
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_saved_and_loaded(tmp_path, model_type):
    model, ids = make(model_type), tokens()
    model.save_pretrained(tmp_path / "float")
    calibration = [ids] if model_type == "mixtral" else None
    moe_ops.quantize(model, INT4, dense=INT8, calibration=calibration)
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert list(model.state_dict()) == names
    held = load_file(tmp_path / "saved" / "model.safetensors")
    assert any(name.endswith(".codes") for name in held)
    loaded = load(tmp_path / "saved")
    assert set(formats(loaded).values()) == {"int4 g32", "int8"}
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))
    if calibration is None:
        read = load(tmp_path / "float", quantization_config=MoeOpsConfig(INT4, dense=INT8))
        assert formats(read) == formats(loaded)
        assert torch.equal(logits(read, ids), logits(model, ids))
        read.save_pretrained(tmp_path / "read")
        assert torch.equal(logits(load(tmp_path / "read"), ids), logits(model, ids))


def test_loaded_layers_run_in_decode_steps(tmp_path):
    model, ids = make("qwen3_moe"), tokens(1, 5)
    moe_ops.quantize(model, INT4, dense=INT8)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = loaded.generate(ids, **greedy)
    report = moe_ops.hf.optimize(loaded)
    assert report["model.layers.0"] == "fused layer"
    assert torch.equal(loaded.generate(ids, **greedy), want)
    found = moe_ops.hf.report(loaded)
    assert found["lm_head"] == found["model.layers.1.self_attn.q_proj"] == "int8"
    assert "model.layers.0" not in found.left  # Its last call was one step.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("model_type", TYPES)
def test_loaded_layers_are_known(model_type, dense, dtype, tmp_path):
    """A loaded model of few bits takes the steps of one that was quantized in place."""
    model, ids = make(model_type).to(dtype), tokens(1, 5)
    moe_ops.hf.optimize(model, quantization=dense)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    moe_ops.hf.optimize(loaded)
    for each in (model, loaded):
        each.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    wanted, got = moe_ops.hf.report(model), moe_ops.hf.report(loaded)
    assert dict(got) == dict(wanted) and got.left == wanted.left


def test_a_tied_head_stays_float_while_loading(tmp_path):
    model = make("mixtral", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    read = load(tmp_path, quantization_config=MoeOpsConfig(INT4, dense=INT8))
    assert type(read.lm_head) is torch.nn.Linear
    assert formats(read)["model.layers.0.self_attn.q_proj"] == "int8"


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MoeOpsConfig: config must be an Int8WeightConfig"):
        MoeOpsConfig(INT4, dense="int8")
    with pytest.raises(ValueError, match=r"quantize: config must be an Int8WeightConfig"):
        moe_ops.quantize(make("mixtral"), INT4, dense="int8")
    make("mixtral").save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--dense", "int3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "--dense must be int4, int8 or fp8, got 'int3'" in result.output


def test_command(tmp_path):
    make("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--group-size", "32"]
    result = CliRunner().invoke(app, [*arguments, "--dense", "int8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output[result.output.index("{") :])
    assert (report["format"], report["dense"]) == ("int4 g32", "int8")
    model = load(tmp_path / "out", dtype="auto")
    assert set(formats(model).values()) == {"int4 g32", "int8"} and model.dtype == torch.bfloat16
    direct = load(tmp_path / "float", dtype="auto")
    moe_ops.quantize(direct, INT4, dense=INT8)
    assert torch.equal(logits(direct, tokens()), logits(model, tokens()))
