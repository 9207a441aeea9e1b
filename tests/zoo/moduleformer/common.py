"""Models of the tests of ModuleFormer."""

from __future__ import annotations

import math

import torch

from moe_ops import zoo

from ..lm.common import sharpen

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "attention_size": 24, "num_heads": 3,
    "intermediate_size": 20, "gate_size": 12, "num_attention_experts": 4, "num_mlp_experts": 6,
}  # fmt: skip


def build(gate="mlp", **changes):
    return sharpen(zoo.create_model("moduleformer", **{**SMALL, "gate": gate, **changes})).double()


def gate(w, name, kind, u):
    if kind == "linear":
        return u @ w[f"{name}.w_gate.0.weight"].T
    if kind == "mlp":
        z = u @ w[f"{name}.w_gate.0.weight"].T + w[f"{name}.w_gate.0.bias"]
        return (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ w[f"{name}.w_gate.3.weight"].T
    z = u @ w[f"{name}.w_gate.weight"].T
    rows = w[f"{name}.expert_centroids"]
    cosine = (z @ rows.T) / (z.norm(dim=-1)[:, None] * rows.norm(dim=-1))
    return cosine * w[f"{name}.temperature"].exp()
