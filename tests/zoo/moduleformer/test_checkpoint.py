"""Published checkpoints of ModuleFormer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from ..lm import common
from ..lm.common import change_file
from .common import build


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("mlp", "transformer.h.1.mlpf.gate.w_gate.3.weight"),
        ("linear", "transformer.h.0.attn.q_proj.gate.w_gate.0.weight"),
        ("cosine", "transformer.h.1.attn.q_proj.gate.temperature"),
    ],
)
def test_round_trip(kind, key, tmp_path):
    model = build(kind).float()
    common.check_round_trip(model, tmp_path, a_key=key)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    # Inputs before outputs.
    assert tensors["transformer.h.0.attn.q_proj.experts.weight"].shape == (4, 32, 24)
    assert tensors["transformer.h.0.mlpf.output_experts.weight"].shape == (6, 20, 32)


def test_buffers_of_published_checkpoints_are_ignored(tmp_path):
    model = build().float()
    model.save_pretrained(tmp_path)
    names = [f"transformer.h.{i}.attn.{n}" for i in (0, 1) for n in ("cum_weight", "mask")]
    change_file(tmp_path, lambda t: t.update({n: torch.ones(2) for n in names}))
    report = ModuleFormer.from_pretrained(tmp_path).load_report
    assert report.ignored == names and report.unexpected == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_type": "hash"}, "gate_type must be one of mlp, linear, gmm, got 'hash'"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new', got 'relu'"),
    ],
)
def test_configs_of_something_else(change, words):
    published = ModuleFormerConfig.tiny().to_published()
    with pytest.raises(ValueError, match=f"ModuleFormerConfig: {words}"):
        ModuleFormerConfig.from_published({**published, **change})
