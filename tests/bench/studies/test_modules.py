"""New experts that learn while the old ones stay; how often experts are used."""

from __future__ import annotations

import pytest
import torch
from bench.studies import modules
from tests.zoo.lm import common
from tests.zoo.lm.common import tokens_of
from tests.zoo.moduleformer.common import build

from moe_ops.zoo.moduleformer import ModuleFormer


def test_old_experts_stay_while_new_ones_learn():
    """Bitwise, with momentum, adaptive steps and weight decay."""
    model = build().float()
    tokens = tokens_of(model, 4, 24)
    frozen = modules.freeze_old(model, modules.insert_experts(model, attention=1, mlp=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    handle = modules.hold_frozen(frozen, optimizer)
    first = None
    for _ in range(12):
        optimizer.zero_grad()
        out = model.loss(tokens)
        (out.loss + 1e-3 * modules.new_rows_penalty(frozen)).backward()
        optimizer.step()
        first = out.cross_entropy.item() if first is None else first
    for name, p in model.named_parameters():
        if name in frozen:
            old = len(frozen[name].kept)
            assert torch.equal(p[:old], before[name][:old]), name
            assert not torch.equal(p[old:], before[name][old:]), name
        else:
            assert torch.equal(p, before[name]), name
    assert model.loss(tokens).cross_entropy.item() < first
    # The old model is still there: take the old experts and it is what it was.
    handle.remove()
    modules.unfreeze(model, frozen)
    assert all(p.requires_grad for p in model.parameters())


def test_frequencies_are_shares_of_tokens():
    model = build().train()
    batches = [tokens_of(model, 2, 9), tokens_of(model, 1, 30)]
    found = modules.expert_frequencies(model, batches)
    assert model.training and set(found) == {
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("attention", "mlp")
    }
    model.eval()
    for name, frequency in found.items():
        counts = torch.zeros(len(frequency))
        for tokens in batches:
            for r in model(tokens, return_routing=True).routing:
                if r.layer == name:
                    counts += torch.bincount(r.routing.topk_ids.flatten(), minlength=len(counts))
        torch.testing.assert_close(frequency, counts.double() / 48)
        assert float(frequency.sum()) == pytest.approx(2)


def test_inserting():
    """Sizes, the config, and what is trained afterwards."""
    model = build()
    grown = modules.insert_experts(model, attention=1, mlp=2, init="zero_output")
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
    modules.insert_experts(model, attention=2, mlp=3)
    frequencies = {}
    for i in range(2):
        frequencies[f"layers.{i}.attention"] = torch.tensor([1.0] * 4 + [0.0] * 2)
        frequencies[f"layers.{i}.mlp"] = torch.tensor([1.0] * 6 + [0.0] * 3)
    modules.prune(model, frequencies, 0.5)
    torch.testing.assert_close(model(tokens), before)
    assert model.config == build().config


def test_bad_insertions():
    model = build()
    with pytest.raises(ValueError, match="not both 0, got 0 and 0"):
        modules.insert_experts(model)


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
    kept = modules.prune(model, frequencies, 0.1)
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
    with pytest.raises(ValueError, match=f"prune: .*{words}"):
        modules.prune(build(), frequencies, threshold)
