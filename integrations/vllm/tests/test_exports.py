"""Folders that `moe_ops.hf.export` has written, in vLLM."""

from __future__ import annotations

import pytest
import torch
from integrations.vllm.tests.test_models import check, generate
from tests.hf import published_checkpoints as checkpoints
from transformers import AutoModelForCausalLM

import moe_ops.hf

pytest.importorskip("vllm")

CASES = [
    ("qwen3_moe", "compressed-tensors:int4 g64", None, "compressed-tensors int4"),
    ("mixtral", "compressed-tensors:int4 g32", "none", "compressed-tensors int4"),
    ("qwen3_moe", "compressed-tensors:int8", None, "compressed-tensors int8 (W8A8)"),
    ("qwen3_moe", "compressed-tensors:int4 g64", "int8", "compressed-tensors int4"),
    ("mixtral", "gptq:int4 g64", None, "GPTQ int4"),
    ("qwen3_moe", "gptq:int4", "none", "GPTQ int4"),
]


@pytest.mark.parametrize(("model_type", "format", "dense", "label"), CASES)
def test_an_exported_folder(tmp_path, model_type, format, dense, label):
    checkpoints.build(model_type).save_pretrained(tmp_path / "float")
    folder = tmp_path / "model"
    moe_ops.hf.export(tmp_path / "float", folder, format=format, dense=dense)
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_ops", dtype=torch.float32, attn_implementation="eager"
    )
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(folder, prompts, "eager", tmp_path)
    assert f"Experts run on moe_ops {moe_ops.__version__}: {label}." in log
    check(result, model, prompts)
