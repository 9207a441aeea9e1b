"""Tiny checkpoints in the formats of others, written tensor by tensor, and the float models that
they stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.helpers import published as layout
from transformers import AutoConfig, AutoModelForCausalLM

from moe_ops.quant import dequantize_fp8_blocks, quantize_fp8_blocks

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
GROUP = 64
_PROJECTION = re.compile(r"(experts\.\d+\.\w+|self_attn\.[qkvo]_proj)\.weight$")
QUANTIZATION = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    "autofp8": {"quant_method": "fp8", "activation_scheme": "static"},
    "packed-int8": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
    },
    "mxfp4": {"quant_method": "mxfp4"},
    "nvfp4": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "group_size": 16},
            }
        },
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "fp8-channel": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "fp8-block": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
            }
        },
    },
    "fp8-tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


def build(model_type: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    return AutoModelForCausalLM.from_config(config).eval()


def quantize(method: str, weight: torch.Tensor, zeros: bool) -> tuple[dict, torch.Tensor]:
    """Tensors of a weight [O, D] in a format, and what they stand for."""
    if method in ("fp8", "fp8-block"):
        q, scale = quantize_fp8_blocks(weight)
        leaf = "weight_scale_inv" if method == "fp8" else "weight_scale"
        return {"weight": q, leaf: scale}, dequantize_fp8_blocks(q, scale)
    if method == "packed-int8":
        scale = weight.unflatten(1, (-1, GROUP)).abs().amax(2).div(127).bfloat16()
        steps = scale.float().repeat_interleave(GROUP, 1)
        codes = (weight / steps).round().clamp(-128, 127).to(torch.int8)
        packed = (codes.view(torch.uint8) ^ 128).view(torch.int32)
        return {"weight_packed": packed, "weight_scale": scale}, codes * steps
    if method in ("fp8-channel", "fp8-tensor", "autofp8"):
        most = weight.abs().amax(1, keepdim=True) if method == "fp8-channel" else weight.abs().max()
        scale = (most / 448).bfloat16()
        q = (weight / scale.float()).to(torch.float8_e4m3fn)
        inputs = {"input_scale": torch.rand(())} if method == "autofp8" else {}
        return {"weight": q, "weight_scale": scale} | inputs, q.float() * scale.float()
    if method in ("nvfp4", "modelopt"):
        codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
        scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 400 + 40).to(
            torch.float8_e4m3fn
        )
        factor = 2.0**-13
        parts = layout.nvfp4(codes, scale, factor, method)
        return parts, layout.nvfp4_meaning(codes, scale, factor)
    codes, zero, scale = layout.random_codes(*weight.shape, GROUP, zeros)
    zero = zero.clamp(min=1)
    meaning = layout.meaning(codes, zero, scale)
    write = getattr(layout, method.replace("-", "_"))
    return write(codes, zero, scale), meaning


def write(folder: Path, model_type: str, method: str, zeros: bool = False):
    """The checkpoint; returns the float model."""
    model = build(model_type)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    plain, packed = dict(tensors), {}
    for name, weight in tensors.items():
        if method == "mxfp4" and re.search(r"experts\.(gate_up|down)_proj$", name):
            experts, depth, rows = weight.shape  # As [E, D, O] in the float model.
            codes = torch.randint(0, 16, (experts, rows, depth), dtype=torch.uint8)
            scales = torch.randint(121, 124, (experts, rows, depth // 32), dtype=torch.uint8)
            blocks = codes[..., 0::2] | codes[..., 1::2] << 4
            packed[f"{name}_blocks"] = blocks.view(experts, rows, depth // 32, 16)
            packed[f"{name}_scales"] = scales
            powers = 2.0 ** (scales.double() - 127).repeat_interleave(32, 2)
            plain[name] = (layout.e2m1(codes) * powers).float().mT.contiguous()
        elif method != "mxfp4" and _PROJECTION.search(name):
            parts, plain[name] = quantize(method, weight, zeros)
            stem = name.removesuffix(".weight")
            packed |= {f"{stem}.{leaf}": t.contiguous() for leaf, t in parts.items()}
        else:
            packed[name] = weight
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION[method]
    if method == "gptq":
        config["quantization_config"] = QUANTIZATION[method] | {"sym": not zeros}
    elif method == "awq":
        config["quantization_config"] = QUANTIZATION[method] | {"zero_point": zeros}
    (folder / "config.json").write_text(json.dumps(config))
    return reference, packed


def load(folder, **options):
    """Returns the model of a checkpoint on moe_ops."""
    return AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_ops", dtype=torch.float32, **options
    )
