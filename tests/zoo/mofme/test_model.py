"""The network around the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_ops import zoo

SMALL = {"hidden_size": 8, "num_layers": 1, "num_experts": 3, "num_heads": 1, "channels": 4}


def images(count=6, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def small(**changes):
    torch.manual_seed(0)
    return zoo.create_model("mofme", **{**SMALL, **changes})


def test_patches_keep_their_places():
    """With maps that copy, an image comes out as it came in, in rows and columns alike."""
    model = small(channels=3, hidden_size=48, tail_scale=1, residual=False)
    model.head = model.tail = model.patch_norm = nn.Identity()
    model.layers = nn.ModuleList()
    with torch.no_grad():
        model.patches.weight.copy_(torch.eye(48).view(48, 3, 4, 4))
        model.unpatch.weight.copy_(torch.eye(48))
        model.patches.bias.zero_()
        model.unpatch.bias.zero_()
    there = torch.rand(2, 3, 8, 12)
    made, routing = model(there)
    torch.testing.assert_close(made, there.sigmoid())
    assert routing == []
    with pytest.raises(ValueError, match="h and w multiples of 4, got shape"):
        model(there[..., :10])


def test_a_fresh_model_leaves_images_alone():
    model, there = small(), images()
    made, routing = model(there)
    assert torch.equal(made, there)
    assert len(routing) == 1 and routing[0].topk_ids.shape == (6 * 16, 2)
