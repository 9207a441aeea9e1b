"""Quantised experts beside dense layers that another library has quantised."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

import moe_ops.hf

from . import models


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_beside_dense_layers_of_another_method():
    model, ids = models.build("mixtral", intermediate_size=32), models.tokens()
    alone = copy.deepcopy(model)
    model.quantization_method, model.hf_quantizer = "torchao", SimpleNamespace()
    for each in (alone, model):
        moe_ops.quantize_experts(each, "int8")
    assert torch.equal(logits(model, ids), logits(alone, ids))
    assert model.quantization_method == "torchao"
    with pytest.warns(UserWarning, match="has room for one method of quantisation"):
        assert not model.hf_quantizer.is_serializable()


def test_beside_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    models.build("mixtral", intermediate_size=32).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    options = {"experts_implementation": "moe_ops", "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, **options
    )
    model, ids = model.eval(), models.tokens()
    before = logits(model, ids)
    moe_ops.quantize_experts(model, "int8")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    assert (logits(model, ids) - before).norm() < 0.1 * before.norm()
    with pytest.raises(ValueError), pytest.warns(UserWarning, match="has room for one method"):
        model.save_pretrained(tmp_path / "again")
