"""The short training: it learns, and leaves modes and gradients as they were."""

from __future__ import annotations

import pytest
import torch
from tests.surgery.models import TwoLayers, deepseek, tokens

from moe_ops import surgery


def test_a_pruned_model_learns():
    model, text = deepseek(num_experts=8, top_k=2), tokens(8, 12).split(4)
    surgery.prune_experts(model, {"layers.1.mlp": [0, 1, 2, 3]})
    model.layers[0].train()
    steps = []
    losses = surgery.tune(
        model, text, 12, rate=1e-2, progress=lambda step, loss: steps.append((step, loss))
    )
    assert [loss for _, loss in steps] == losses and steps[-1][0] == 12
    assert losses[-1] < losses[0] - 0.05
    assert model.layers[0].training and not model.layers[1].training
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_of_your_own_and_errors():
    model, x = TwoLayers(), torch.randn(20, 6)
    losses = surgery.tune(model, [x], 5, rate=1e-2, loss=lambda m, batch: m(batch).square().mean())
    assert len(losses) == 5 and losses[-1] < losses[0]
    with pytest.raises(ValueError, match="there must be steps and batches, got 3 and 0"):
        surgery.tune(model, [], 3)
    with pytest.raises(FloatingPointError, match="must be finite, got nan at step 1"):
        surgery.tune(model, [x], 3, loss=lambda m, batch: m(batch).sum() * float("nan"))
