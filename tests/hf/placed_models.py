"""Models with their experts on the CPU, and what their tests share."""

from __future__ import annotations

import torch

import moe_ops
import moe_ops.hf
from moe_ops.hf.experts import placed

from .models import build, tokens

SIZES = {"hidden_size": 64, "intermediate_size": 64}


def pair(model_type, dense, dtype=torch.float32, **options):
    """Returns a model on moe_ops, and a copy with its experts on the CPU."""
    want = build(model_type, dtype=dtype, **options).to(dense)
    moe_ops.hf.enable(want)
    got = build(model_type, dtype=dtype, **options).cpu()
    moe_ops.hf.place(got, dense)
    return want, got


def generate(model, dense):
    return model.generate(tokens().to(dense), max_new_tokens=5, do_sample=False)


def experts_of(model):
    return [m for m in model.modules() if placed.is_placed(m)]


def failing(message):
    """Returns a function that raises ZeroDivisionError."""

    def forward(*args, **kwargs):
        raise ZeroDivisionError(message)

    return forward
