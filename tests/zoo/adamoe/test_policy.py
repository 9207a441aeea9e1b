"""The flow of actions, and dense policies that are made sparse."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.adamoe.skills import demonstrate

from moe_ops import zoo
from moe_ops.zoo.adamoe import time_features

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}


def small(ffn="additive", **changes):
    torch.manual_seed(0)
    return zoo.create_model("adamoe", ffn=ffn, **{**SMALL, **changes})


def test_flow_loss_is_that_of_a_straight_path():
    policy = small()
    data = demonstrate(6, 4, generator=torch.Generator().manual_seed(0))
    noise, time = torch.randn_like(data.actions), torch.rand(6)
    found = policy.loss(*data, noise=noise, time=time, balance_weight=0.5)
    errors = []
    for i in range(6):
        x = time[i] * noise[i] + (1 - time[i]) * data.actions[i]
        states = (data.states[i : i + 1], data.skills[i : i + 1])
        velocity = policy(*states, x[None], time[i : i + 1])[0][0]
        errors.append((velocity - (noise[i] - data.actions[i])).square().mean())
    torch.testing.assert_close(found.action, torch.stack(errors).mean())
    torch.testing.assert_close(found.loss, found.action + 0.5 * found.balance)
    assert len(found.routing) == 1


def test_times_are_of_the_beta_distribution():
    policy = small("dense")
    seen = []
    policy.forward = lambda states, skills, noisy, time: (seen.append(time), (noisy, []))[1]
    data = demonstrate(4000, 4, generator=torch.Generator().manual_seed(0))
    policy.loss(*data, generator=torch.Generator().manual_seed(1))
    # Beta(1.5, 1): mean 0.6, variance 0.6 * 0.4 / 3.5.
    assert float(seen[0].mean()) == pytest.approx(0.6, abs=0.015)
    assert float(seen[0].var()) == pytest.approx(0.24 / 3.5, abs=0.006)
    assert seen[0].min() >= 0.001 and seen[0].max() <= 1


def test_euler_follows_a_known_velocity():
    policy = small("dense", flow_steps=5)
    target = torch.randn(3, 4, 2)
    times = []

    def velocity(states, skills, x, time):
        times.append(float(time[0]))
        return (x - target) / time[:, None, None], []  # The straight path from x to the target.

    policy.forward = velocity
    actions = policy.act(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(actions, target)
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_time_features():
    features = time_features(torch.tensor([0.25, 1.0]), 4)
    periods = (0.004, 4.0)
    wanted = [
        [f(2 * math.pi * t / p) for f in (math.sin, math.cos) for p in periods] for t in (0.25, 1.0)
    ]
    torch.testing.assert_close(features, torch.tensor(wanted), atol=1e-4, rtol=0)


def test_made_sparse():
    policy = small("dense")
    data = demonstrate(6, 4)
    args = (data.states, data.skills, data.actions, torch.rand(6))
    # Without routing weights the bias makes the weights of a token add up to 1 exactly.
    same = policy.made_sparse("additive", preserve=True, init_std=0.0, num_experts=3)
    torch.testing.assert_close(same(*args)[0], policy(*args)[0])
    assert same.config.ffn == "additive" and same.config.num_experts == 3
    assert not torch.allclose(policy.made_sparse("coupled")(*args)[0], policy(*args)[0])
    with pytest.raises(ValueError, match="ffn must be 'dense' to be made sparse, got 'additive'"):
        same.made_sparse("additive")
