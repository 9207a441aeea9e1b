from __future__ import annotations

import pytest
import torch

from moe_ops.layers import load_balancing_loss, router_z_loss
from moe_ops.layers.layer_losses import total_load_balancing_loss, total_router_z_loss
from moe_ops.reference._scores import SCORE_FUNCS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [None, "some", "all"])
@pytest.mark.parametrize("score_func", SCORE_FUNCS)
def test_equal_the_sum_over_layers(score_func, masked, dtype):
    """Values and gradients, also where masked tokens hold NaN."""
    logits = torch.randn(3, 13, 5).to(dtype)
    ids = torch.randint(-1, 6, (3, 13, 2))
    mask = None
    if masked is not None:
        mask = torch.rand(13) > (0.4 if masked == "some" else 1.0)
        logits[:, ~mask] = torch.nan
    results = []
    for together in (True, False):
        layers = [t.clone().requires_grad_() for t in logits]
        if together:
            balance = total_load_balancing_loss(
                layers, list(ids), score_func=score_func, token_mask=mask
            )
            z = total_router_z_loss(layers, token_mask=mask)
        else:
            balance = sum(
                load_balancing_loss(t, i, score_func=score_func, token_mask=mask)
                for t, i in zip(layers, ids, strict=True)
            )
            z = sum(router_z_loss(t, token_mask=mask) for t in layers)
        grads = torch.autograd.grad(balance + 0.5 * z, layers)
        results.append((balance.detach(), z.detach(), torch.stack(grads)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    layers, ids = [torch.randn(num_tokens, 4)] * 2, [torch.zeros(num_tokens, 2)] * 2
    want = 2 * load_balancing_loss(layers[0], ids[0])
    torch.testing.assert_close(total_load_balancing_loss(layers, ids), want)
    torch.testing.assert_close(total_router_z_loss(layers), 2 * router_z_loss(layers[0]))
