"""Models in vLLM against transformers, for each layout of weights that the plugin reads.

A checkpoint is written in the format of another library, together with the float model that it
stands for. transformers computes that model in float32, vLLM the checkpoint in bfloat16.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.vllm.tests.engine import run
from tests.hf import published_checkpoints as checkpoints
from transformers import AutoModelForCausalLM

import moe_ops.hf
from moe_ops.quant import Fp8WeightConfig, Int4WeightConfig, Int8WeightConfig

pytest.importorskip("vllm")

QUANTIZE = checkpoints.quantize
# Rounding to bfloat16 of a model of one layer; logits are spread over 1.2 to 1.6.
TOLERANCE = 0.03
GATE, ATTENTION = "re:.*mlp.gate$", "re:.*self_attn.*"


def group(**weights: object) -> dict[str, object]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
}
# What a complete config of vLLM has beside that of the checkpoints of tests/hf.
SETTINGS: dict[str, dict[str, object]] = {
    "gptq": {"lm_head": False, "dynamic": {"-:.*mlp.gate$": {}}},
    "awq": {"modules_to_not_convert": ["mlp.gate"]},
    "compressed-tensors": {"ignore": ["lm_head", GATE]},
    "nvfp4": {
        "ignore": ["lm_head", GATE, ATTENTION],
        "config_groups": group(**NVFP4),
    },
    "nvfp4-dense": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head", GATE],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": NVFP4,
                "input_activations": NVFP4 | {"dynamic": "local"},
            }
        },
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
    ("qwen3_moe", "nvfp4-dense", False, "compressed-tensors NVFP4"),
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


def nvfp4_with_inputs(
    method: str, weight: torch.Tensor, zeros: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """NVFP4 with the factor of rounded inputs, which moe_ops does not round."""
    parts, meaning = QUANTIZE("nvfp4", weight, zeros)
    return parts | {"input_global_scale": torch.ones(1)}, meaning


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
    if method == "nvfp4-dense":
        monkeypatch.setattr(checkpoints, "quantize", nvfp4_with_inputs)
    if method in ("nvfp4", "int8", "int8-packed"):  # Experts alone: dense layers are vLLM's.
        monkeypatch.setattr(checkpoints, "_PROJECTION", re.compile(r"(experts\.\d+\.\w+)\.weight$"))
    return checkpoints.write(folder, model_type, method, zeros)[0]


def generate(folder: Path, prompts: torch.Tensor, mode: str, cache: Path, **options: Any):
    """Returns the result of engine.py for one batch, and the log."""
    engine = {"enforce_eager": mode == "eager", "enable_prefix_caching": False}
    engine |= options.pop("engine", {})
    return run(folder, cache, [prompts.tolist()], engine=engine, **options)


def check(result, model, prompts: torch.Tensor) -> None:
    with torch.no_grad():
        want = model(prompts).logits[:, -1].float().log_softmax(-1)
    for row, completions in zip(want, result["batches"][0], strict=True):
        tokens = completions[0]["logprobs"][0]
        for token, got in tokens.items():
            assert abs(got - row[int(token)].item()) <= TOLERANCE
        if row.topk(2).values.diff().abs() > 2 * TOLERANCE:
            assert int(max(tokens, key=tokens.get)) == int(row.argmax())


@pytest.mark.parametrize(("model_type", "method", "zeros", "label"), CASES)
def test_a_published_layout(monkeypatch, tmp_path, model_type, method, zeros, label):
    model = write(monkeypatch, tmp_path / "model", model_type, method, zeros)
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(tmp_path / "model", prompts, "eager", tmp_path)
    assert f"Experts run on moe_ops {moe_ops.__version__}: {label}." in log
    assert result["ops"].pop("moe_ops::moe_ffn_quantized") == 2
    dense = result["ops"].pop("moe_ops::grouped_gemm_quantized", 0)
    assert result["ops"] == {}
    # Of fp8, vLLM has a kernel for CPUs with AMX.
    assert dense == 4 if method == "nvfp4-dense" else dense in ((0, 4) if method == "fp8" else (0,))
    check(result, model, prompts)


@pytest.mark.parametrize(
    ("model_type", "config", "ranks", "experts"),
    [
        ("qwen3_moe", Int4WeightConfig(group_size=64), 1, False),
        ("mixtral", Int4WeightConfig(group_size=64), 2, False),
        ("mixtral", Int8WeightConfig(), 2, True),
        ("qwen3_moe", Fp8WeightConfig(), 1, False),
    ],
)
def test_a_checkpoint_of_moe_ops(tmp_path, model_type, config, ranks, experts):
    model = checkpoints.build(model_type)
    moe_ops.quantize(model, config)
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(3, 60, (4, 12))
    engine = {"tensor_parallel_size": ranks, "enable_expert_parallel": experts}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    result, log = generate(tmp_path / "model", prompts, "eager", tmp_path, engine=engine, env=env)
    assert f"Experts run on moe_ops {moe_ops.__version__}: {config.label}." in log
    check(result, model, prompts)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_float_weights(tmp_path, model_type, mode):
    model = checkpoints.build(model_type)
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(tmp_path / "model", prompts, mode, tmp_path)
    assert f"Experts run on moe_ops {moe_ops.__version__}: bfloat16." in log
    assert result["ops"] == {"moe_ops::moe_ffn_packed": 2}
    check(result, model, prompts)


def test_turned_off(tmp_path):
    """Without the plugin the engine runs no op of moe_ops, and finds none of its cached graphs."""
    model = checkpoints.build("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(3, 60, (4, 12))
    generate(tmp_path / "model", prompts, "compiled", tmp_path)
    off = {"MOE_OPS_VLLM": "0"}
    result, log = generate(tmp_path / "model", prompts, "compiled", tmp_path, env=off)
    assert f"moe_ops {moe_ops.__version__}" not in log
    assert result["ops"] == {}
    check(result, model, prompts)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        (None, "eager"),
        (None, "compiled"),
        ("compressed-tensors:int4 g32", "eager"),
        ("compressed-tensors:int8", "eager"),
        ("gptq:int4", "compiled"),
    ],
)
def test_weights_are_reloaded(tmp_path, format, mode):
    """A trainer gives a running engine new weights."""
    for name in ("old", "new"):
        model = checkpoints.build("qwen3_moe")
        experts = model.model.layers[0].mlp.experts
        with torch.no_grad():
            experts.down_proj.mul_(20)  # Their output changes the most likely tokens.
            if name == "new":
                experts.gate_up_proj.copy_(experts.gate_up_proj.flip(0))
        model.save_pretrained(tmp_path / name)
        if format is not None:
            moe_ops.hf.export(tmp_path / name, tmp_path / f"{name}-q", format=format, dense="none")
    old, new = (tmp_path / (name + "-q" * (format is not None)) for name in ("old", "new"))
    model = AutoModelForCausalLM.from_pretrained(
        new, experts_implementation="moe_ops", dtype=torch.float32, attn_implementation="eager"
    )
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(old, prompts, mode, tmp_path, reload=str(new))
    assert "Experts run on moe_ops" in log
    check(result, model, prompts)
