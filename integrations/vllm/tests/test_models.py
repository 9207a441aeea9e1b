"""Models in vLLM against transformers, for each layout of weights that the plugin reads.

A checkpoint is written in the format of another library, together with the float model that it
stands for. transformers computes that model in float32, vLLM the checkpoint in bfloat16.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.hf import published_checkpoints as checkpoints

pytest.importorskip("vllm")

# Rounding to bfloat16 of a model of one layer; logits are spread over 1.2 to 1.6.
TOLERANCE = 0.03
GATE, ATTENTION = "re:.*mlp.gate$", "re:.*self_attn.*"


def group(**weights: object) -> dict[str, object]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


# What a complete config of vLLM has beside that of the checkpoints of tests/hf.
SETTINGS: dict[str, dict[str, object]] = {
    "gptq": {"lm_head": False, "dynamic": {"-:.*mlp.gate$": {}}},
    "awq": {"modules_to_not_convert": ["mlp.gate"]},
    "compressed-tensors": {"ignore": ["lm_head", GATE]},
    "nvfp4": {
        "ignore": ["lm_head", GATE, ATTENTION],
        "config_groups": group(
            num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
        ),
    },
    "fp8": {
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    },
    "mxfp4": {},
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head", GATE, ATTENTION],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    },
    "int8-packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", GATE, ATTENTION],
        "config_groups": group(num_bits=8, type="int", symmetric=True, strategy="channel"),
    },
}
CASES = [
    ("qwen3_moe", "gptq", False, "GPTQ int4"),
    ("qwen3_moe", "awq", False, "AWQ int4"),
    ("qwen3_moe", "awq", True, "AWQ int4"),
    ("mixtral", "compressed-tensors", False, "compressed-tensors int4"),
    ("qwen3_moe", "compressed-tensors", True, "compressed-tensors int4"),
    ("qwen3_moe", "fp8", False, "fp8 in blocks"),
    ("gpt_oss", "mxfp4", False, "MXFP4"),
    ("qwen3_moe", "nvfp4", False, "compressed-tensors NVFP4"),
    ("qwen3_moe", "int8", False, "compressed-tensors int8 (W8A8)"),
    ("qwen3_moe", "int8-packed", False, "compressed-tensors int8"),
]


def int8(method: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """int8 with a scale a row, as bytes or in words of four with 128 added, and what it means."""
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    scale = (torch.rand(len(weight), 1) + 0.5) / (128 * weight.shape[1] ** 0.5)
    meaning = codes.float() * scale
    if method == "int8":
        return {"weight": codes, "weight_scale": scale}, meaning
    words = (codes.view(torch.uint8) ^ 128).view(torch.int32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}, meaning


def write(monkeypatch, folder: Path, model_type: str, method: str, zeros: bool):
    settings = dict(SETTINGS[method])
    if method == "compressed-tensors":
        settings["config_groups"] = group(
            num_bits=4,
            type="int",
            symmetric=not zeros,
            strategy="group",
            group_size=checkpoints.GROUP,
        )
    monkeypatch.setitem(
        checkpoints.QUANTIZATION, method, checkpoints.QUANTIZATION.get(method, {}) | settings
    )
    if method == "fp8":  # Rows of keys must be whole blocks in vLLM's own layers.
        monkeypatch.setitem(checkpoints.SIZES, "num_key_value_heads", 4)
    if method.startswith("int8"):
        monkeypatch.setattr(checkpoints, "quantize", lambda method, weight, _: int8(method, weight))
    if method in ("nvfp4", "int8", "int8-packed"):  # Experts alone: dense layers are vLLM's.
        monkeypatch.setattr(checkpoints, "_PROJECTION", re.compile(r"(experts\.\d+\.\w+)\.weight$"))
    return checkpoints.write(folder, model_type, method, zeros)[0]


def generate(folder: Path, prompts: torch.Tensor, mode: str, cache: Path, plugin: bool = True):
    """Returns the result of engine.py and its log."""
    env = {
        **os.environ,
        "MOE_OPS_VLLM": str(int(plugin)),
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(cache),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine.py")), str(folder), mode],
        input=json.dumps(prompts.tolist()),
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    log = done.stdout + done.stderr
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, log[-3000:]
    return json.loads(found[1]), log


def check(result, model, prompts: torch.Tensor) -> None:
    with torch.no_grad():
        want = model(prompts).logits[:, -1].float().log_softmax(-1)
    for row, tokens in zip(want, result["tokens"], strict=True):
        for token, got in tokens.items():
            assert abs(got - row[int(token)].item()) <= TOLERANCE
        if row.topk(2).values.diff().abs() > 2 * TOLERANCE:
            assert int(max(tokens, key=tokens.get)) == int(row.argmax())


@pytest.mark.parametrize(("model_type", "method", "zeros", "label"), CASES)
def test_a_published_layout(monkeypatch, tmp_path, model_type, method, zeros, label):
    model = write(monkeypatch, tmp_path / "model", model_type, method, zeros)
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(tmp_path / "model", prompts, "eager", tmp_path)
    assert f"Experts run on moe_ops 0.1.0: {label}." in log
    assert result["ops"] == {"moe_ops::moe_ffn_quantized": 2}
    check(result, model, prompts)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_float_weights(tmp_path, model_type, mode):
    model = checkpoints.build(model_type)
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(tmp_path / "model", prompts, mode, tmp_path)
    assert "Experts run on moe_ops 0.1.0: bfloat16." in log
    assert result["ops"] == {"moe_ops::moe_ffn_packed": 2}
    check(result, model, prompts)


def test_turned_off(tmp_path):
    """Without the plugin the engine runs no op of moe_ops, and finds none of its cached graphs."""
    model = checkpoints.build("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(3, 60, (4, 12))
    generate(tmp_path / "model", prompts, "compiled", tmp_path)
    result, log = generate(tmp_path / "model", prompts, "compiled", tmp_path, plugin=False)
    assert "moe_ops 0.1.0" not in log
    assert result["ops"] == {}
    check(result, model, prompts)
