"""Tests how many float weights are in memory while a checkpoint is quantized."""

from __future__ import annotations

import pytest

import moe_ops
from moe_ops.hf import MoeOpsConfig
from moe_ops.hf.checkpoints import quantizer
from moe_ops.quant.bank import find_banks

from .test_quantize import load, make


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx"])
def test_one_bank_is_float_at_a_time(tmp_path, model_type, monkeypatch):
    """Never more float expert weights in memory than one bank has."""
    model = make(model_type, num_hidden_layers=4) if model_type != "dbrx" else make(model_type)
    model.save_pretrained(tmp_path)
    sizes = [b.bank.num_bytes for b in find_banks(model)]
    assert len(sizes) > 1 or model_type == "llama4_text"
    most, take = [], quantizer.ExpertsQuantizer.take

    def watched(self, model, name, weight):
        take(self, model, name, weight)
        left = [b.bank for b in find_banks(model)]
        weights = [t for bank in left for _, t in bank.tensors() if not t.is_meta]
        most.append(sum(w.nbytes for w in weights))

    monkeypatch.setattr(quantizer.ExpertsQuantizer, "take", watched)
    load(tmp_path, quantization_config=MoeOpsConfig(moe_ops.Int8WeightConfig()))
    assert most and most[-1] == 0
    assert max(most) < max(sizes)
