"""Language models of the zoo on kernels for inference."""

from __future__ import annotations

import pytest
import torch

import moe_ops
from moe_ops import zoo
from moe_ops.quant import QuantizedLinear
from moe_ops.zoo.lm import attention
from moe_ops.zoo.lm.optimize import optimize

from .common import sharpen, tokens_of

SYSTEMS = ("topp", "deepseek", "jetmoe", "coe", "moduleformer")


def build(name):
    torch.manual_seed(0)
    return sharpen(zoo.create_model(name, preset="tiny")).eval()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_tokens(name):
    model = build(name)
    prompt, state = tokens_of(model, 2, 5), list(model.state_dict())
    want = model.generate(prompt, 8)
    with torch.no_grad():
        logits = model(prompt)
    report = optimize(model)
    assert torch.equal(model.generate(prompt, 8), want)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt), logits, rtol=1e-3, atol=1e-3)
    assert set(report.values()) == {"few rows"}
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("name", ["topp", "deepseek", "coe"])
def test_codes(name):
    model = build(name)
    prompt = tokens_of(model, 1, 5)
    with torch.no_grad():
        want = model(prompt)
    report = optimize(model, quantization=moe_ops.Int8WeightConfig())
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {n for n, how in report.items() if how == "int8"} == quantized
    assert "lm_head" in quantized and not any("kv_b_proj" in n for n in quantized)
    with torch.no_grad():
        error = model(prompt) - want
    assert error.norm() < 0.2 * want.norm()
    assert model.generate(prompt, 4).shape == (1, 9)


@pytest.mark.parametrize(("name", "op"), [("topp", "attention_decode"), ("deepseek", "mla_decode")])
def test_steps_take_one_call_of_attention(name, op, monkeypatch):
    calls, function = [], getattr(attention, op)

    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(attention, op, count)
    model = build(name)
    model.generate(tokens_of(model, 2, 5), 3)
    assert len(calls) == 3 * len(model.layers)
    calls.clear()
    model.loss(tokens_of(model, 2, 5)).loss.backward()
    handle = model.layers[0].attention.o_proj.register_forward_hook(lambda *_: None)
    model.generate(tokens_of(model, 1, 2), 1)
    handle.remove()
    assert len(calls) == len(model.layers) - 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"config must be an Int8WeightConfig, .*, got 'int8'"):
        optimize(build("topp"), quantization="int8")
