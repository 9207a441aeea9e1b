"""Modules that are inserted and taken away."""

from __future__ import annotations

import pytest
import torch
from bench.studies import modules

from moe_ops.zoo.moduleformer import ModuleFormer

from ..lm import common
from ..lm.common import tokens_of
from .common import build


def test_inserting():
    """Sizes, the config, and what is trained afterwards."""
    model = build()
    grown = model.insert_experts(attention=1, mlp=2, init="zero_output")
    assert model.config.num_attention_experts == 5 and model.config.num_mlp_experts == 8
    for block in model.layers:
        assert block.attention.w_query.shape[0] == block.attention.router.num_experts == 5
        assert block.mlp.experts.w_down.shape[0] == block.mlp.router.num_experts == 8
        assert bool((block.mlp.experts.w_down[6:] == 0).all())
        assert bool((block.attention.w_output[4:] == 0).all())
    assert all(p.requires_grad for p in model.parameters())
    frozen = modules.freeze_old(model, grown)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(frozen) and len(trained) == 2 * 6
    assert "layers.0.mlp.router.stem.weight" not in trained


def test_the_old_model_is_inside_the_grown_one():
    model = build()
    tokens = tokens_of(model)
    before = model(tokens)
    model.insert_experts(attention=2, mlp=3)
    frequencies = {}
    for i in range(2):
        frequencies[f"layers.{i}.attention"] = torch.tensor([1.0] * 4 + [0.0] * 2)
        frequencies[f"layers.{i}.mlp"] = torch.tensor([1.0] * 6 + [0.0] * 3)
    model.prune(frequencies, 0.5)
    torch.testing.assert_close(model(tokens), before)
    assert model.config == build().config


def test_bad_insertions():
    model = build()
    with pytest.raises(ValueError, match="not both 0, got 0 and 0"):
        model.insert_experts()


def test_pruning(tmp_path):
    model = build()
    tokens = tokens_of(model)
    frequencies = {
        "layers.0.mlp": torch.tensor([0.5, 0.0, 0.2, 0.05, 0.9, 0.35]),
        "layers.1.attention": torch.tensor([0.0, 0.01, 0.02, 0.0]),
    }
    masks = {
        "layers.0.mlp": torch.tensor([True, False, True, False, True, True]),
        "layers.1.attention": torch.tensor([False, True, True, False]),
    }
    # What the model says when the dropped experts may not be used.
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "expert_mask": mask}),
            with_kwargs=True,
        )
        for name, mask in masks.items()
    ]
    expected = model(tokens)
    for handle in handles:
        handle.remove()
    kept = model.prune(frequencies, 0.1)
    # All are rare in the second layer: the K most used stay.
    assert kept == {"layers.0.mlp": [0, 2, 4, 5], "layers.1.attention": [1, 2]}
    torch.testing.assert_close(model(tokens), expected)
    assert model.config.experts_of_layers == ((4, 4), (2, 6))
    assert model.config.num_mlp_experts == 6

    model = model.float()
    model.save_pretrained(tmp_path)
    again = ModuleFormer.from_pretrained(tmp_path, device=torch.get_default_device())
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    common.check_gradients_flow(again)


@pytest.mark.parametrize(
    ("frequencies", "threshold", "words"),
    [
        ({}, 2.0, r"threshold must be in \[0, 1\], got 2.0"),
        ({"layers.2.mlp": torch.ones(6)}, 0.1, r"got layers\.2\.mlp"),
        ({"layers.0.mlp": torch.ones(5)}, 0.1, r"must be \[6\], got \[5\]"),
    ],
)
def test_bad_pruning(frequencies, threshold, words):
    with pytest.raises(ValueError, match=f"ModuleFormer.prune: .*{words}"):
        build().prune(frequencies, threshold)


def test_concentration_gathers_the_load():
    """A few steps with the loss lower the entropy of the mean routing."""
    model = build().float()
    tokens = tokens_of(model, 4, 24)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    optimizer = torch.optim.Adam(routers, lr=0.02)

    def entropy():
        return model.loss(tokens, coefficients={"concentration": 1.0}).aux_losses["concentration"]

    before = float(entropy())
    for _ in range(20):
        optimizer.zero_grad()
        entropy().backward()
        optimizer.step()
    assert float(entropy()) < before - 0.5
