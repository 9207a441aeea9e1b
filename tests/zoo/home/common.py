"""Models and batches of the tests of the multi-task models."""

from __future__ import annotations

import dataclasses

import torch
from bench.studies.home.models import OpenGates, RecommenderConfig, build
from torch import nn

from moe_ops.zoo.home import HoME
from moe_ops.zoo.home.layers import FeatureGate, Gates

T = 13

CONFIG = RecommenderConfig(
    cardinalities=(5, 3),
    num_dense=4,
    categories=(("a", "b"), ("c",), ("d", "e")),
    embedding_size=3,
    expert_hidden=6,
    expert_size=5,
    tower_hidden=4,
    num_shared=2,
    num_category=2,
    num_task=1,
)


def make(model: str, **changes) -> HoME:
    module = build(dataclasses.replace(CONFIG, model=model, **changes)).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def batch(rows: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    categorical = torch.stack([torch.randint(c, (rows,)) for c in CONFIG.cardinalities], dim=1)
    return categorical, torch.randn(rows, CONFIG.num_dense, dtype=torch.float64)


def gate(gates: Gates, m: int, x: torch.Tensor, allowed: list[int], outputs) -> torch.Tensor:
    """The mixture of the allowed experts by gate m."""
    logits = x @ gates.linear.weight[m].T + gates.linear.bias[m]
    if len(allowed) == 1 and not isinstance(gates, OpenGates):
        weights = logits[:, allowed].sigmoid()
    else:
        weights = logits[:, allowed].exp()
        weights = weights / weights.sum(-1, keepdim=True)
    return sum(weights[:, [i]] * outputs[e] for i, e in enumerate(allowed))


def feature_gate(module: FeatureGate, g: int, v: torch.Tensor) -> torch.Tensor:
    share = (v @ module.select.weight[g].T + module.select.bias[g]).softmax(-1)
    total = 0
    for l in range(module.num_lora):
        b = module.down.weight[g, l * module.rank : (l + 1) * module.rank].T  # [V, d]
        a = module.up.weight[g * module.num_lora + l].T  # [d, V]
        total = total + share[:, [l]] * 2 / (1 + (-(v @ b @ a)).exp())
    return v * total
