"""Steps of decoding of the zoo's language models."""

from __future__ import annotations

import pytest
import torch

from moe_ops import zoo
from moe_ops.zoo.lm import attention

from .common import sharpen, tokens_of


def build(name):
    torch.manual_seed(0)
    return sharpen(zoo.create(name, preset="tiny")).eval()


@pytest.mark.parametrize(
    ("name", "op"), [("topp", "attention_step"), ("deepseek", "latent_attention_step")]
)
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
