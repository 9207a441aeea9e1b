"""The detector on planted numbers, sinks and damage against what they are by definition."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from tests.surgery.models import deepseek, tokens

from moe_ops import surgery
from moe_ops.layers import Experts

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


def profile_of(*largest: list[float]) -> surgery.ExpertProfile:
    layers = {}
    for index, row in enumerate(largest):
        layer = surgery.LayerProfile.empty(len(row), 1, 3, 1)
        layer.max_output[0] = torch.tensor(row)
        layer.max_channel[:] = index
        layer.load[:] = torch.arange(len(row)) * 10
        layers[f"layers.{index}"] = layer
    return surgery.ExpertProfile(layers)


def test_detector_by_hand():
    rows = [[1.0] * 25 + [30.0] + [1.0] * 24 for _ in range(4)]
    rows[0][3], rows[1][7], rows[3][9] = 700.0, 60.0, 900.0
    # Of 200 numbers the 99.5th percentile is at place 198.005, just above the second largest.
    none = surgery.find_super_experts(profile_of(*rows))
    assert none.threshold == pytest.approx(700 + 0.005 * 200) and not none.experts
    # The 99th is at 197.01; a tenth of the largest is more; layer 3 of 4 is a late one.
    found = surgery.find_super_experts(profile_of(*rows), percentile=99)
    assert found.threshold == 90
    assert [(one.layer, one.expert, one.largest) for one in found.experts] == [
        ("layers.0", 3, 700.0)
    ]
    assert found.experts[0].channel == 0 and found.experts[0].z == 0.0  # Half of them are 1.
    lower = surgery.find_super_experts(profile_of(*rows), percentile=90, part=0.05)
    assert [one.expert for one in lower.experts] == [3, 7]
    every = surgery.find_super_experts(profile_of(*rows), percentile=90, part=0.05, first_layers=1)
    assert [one.largest for one in every.experts] == [900.0, 700.0, 60.0]


def test_robust_score_by_hand():
    values = [math.e**p for p in (0, 1, 2, 3, 10)]
    found = surgery.find_super_experts(profile_of(values), first_layers=1)
    # log: median 2, deviations 2 1 0 1 8, their median 1.
    assert found.experts[0].z == pytest.approx(8 / 1.4826)


def test_controls_are_of_the_same_layer_and_load():
    layer = profile_of([1.0] * 6)["layers.0"]  # Loads 0, 10, 20, ...
    assert surgery.super_experts.matched_controls(layer, 2) == [1, 3, 0]
    assert surgery.super_experts.matched_controls(layer, 2, 2, excluded=[1]) == [3, 0]


@torch.no_grad()
def test_planted_expert_is_found_and_costs_what_it_writes():
    model = deepseek(num_layers=4, num_experts=8, top_k=2)
    name = "layers.1.mlp"
    # Ordinary experts say little; this one writes one channel in large numbers.
    for module in model.modules():
        if isinstance(module, Experts):
            module.w_down.mul_(0.01)
    expert = int(surgery.profile_experts(model, [tokens(4, 9)])[name].load.argmax())
    model.get_submodule(name).experts.w_down[expert, 5] = 20.0
    batches = [tokens(4, 9)]
    found = surgery.profile_experts(model, batches)
    got = surgery.evaluate_super_experts(model, found, batches, first_layers=1)
    assert [(one.layer, one.expert, one.channel) for one in got.experts] == [(name, expert, 5)]
    assert got.layers == list(found) and len(got.sinks) == 4
    assert abs(got.damage[0]) > 5 * max(map(abs, got.control_damage[0]))
    assert got.without - got.loss == pytest.approx(got.damage[0])
    assert len(got.controls[0]) == 3 and expert not in got.controls[0]
    text = got.table()
    assert name in text and "without all of them" in text
    json.dumps(got.to_dict())
    states = surgery.find_massive_activations(model, batches[0])
    assert [one.layer for one in states] == [f"layers.{i}" for i in range(4)]
    assert states[1].channel == 5 and states[1].largest > 10 * states[0].largest


@torch.no_grad()
@pytest.mark.parametrize("latent", [False, True])
def test_sink_mass_is_that_of_the_attention(latent):
    model, ids = deepseek(latent=latent, rope_interleaved=latent), tokens(2, 6)
    # With queries of 0, each of n keys gets 1 / n.
    for block in model.layers:
        block.attention.q_proj.weight.zero_()
    mass = surgery.attention_sink_mass(model, ids)
    expected = sum(1 / n for n in range(2, 7)) / 5
    assert mass.shape == (2, 4)
    torch.testing.assert_close(mass, torch.full((2, 4), expected, dtype=torch.float64))
    both = surgery.attention_sink_mass(model, ids, (0, 1))
    assert float(both[0, 0]) == pytest.approx(sum(2 / n for n in range(3, 7)) / 4)
    assert all(block.attention.watcher is None for block in model.layers)
    with pytest.raises(ValueError, match="S - 1 > positions"):
        surgery.attention_sink_mass(model, ids, (5,))


def test_sink_decay_by_hand():
    before = torch.tensor([[0.8, 0.4], [0.01, 0.5]])
    after = torch.tensor([[0.2, 0.4], [0.9, 0.0]])
    assert surgery.attention_sink_decay(before, after) == pytest.approx(1 - (0.25 + 1 + 0) / 3)
    assert math.isnan(surgery.attention_sink_decay(before, after, least=0.9))


@needs_transformers
@torch.no_grad()
def test_models_of_transformers():
    from tests.hf import models

    model, ids = models.build("qwen3_moe"), models.tokens(1, 8)
    model.set_attn_implementation("sdpa")
    mass = surgery.attention_sink_mass(model, ids)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    expected = torch.stack([a[0, :, 1:, 0].mean(-1) for a in attentions])
    torch.testing.assert_close(mass.float(), expected)
    batch = {"input_ids": ids}
    got = surgery.evaluate_super_experts(
        model, surgery.profile_experts(model, [batch]), [batch], percentile=80, first_layers=1
    )
    assert got.loss == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)
    padded = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][:, 5:] = 0
    short = surgery.super_experts.mean_loss(model, [{"input_ids": ids[:, :5]}])
    assert surgery.super_experts.mean_loss(model, [padded]) == pytest.approx(short, rel=1e-4)
    assert len(surgery.find_massive_activations(model, ids)) == 2


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    model, batches = deepseek(num_experts=8, top_k=2), [tokens(4, 9)]
    found = surgery.profile_experts(model, batches)
    found.draw(tmp_path / "profile.png")
    got = surgery.evaluate_super_experts(model, found, batches, first_layers=1, sinks=False)
    assert got.sinks is None and math.isnan(got.decay)
    got.draw(tmp_path / "super.svg")
    assert (tmp_path / "profile.png").stat().st_size > 1000
    assert b"expert" in (tmp_path / "super.svg").read_bytes() or got.experts
