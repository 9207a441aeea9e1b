"""The environment of skills, groups of parameters, and what is measured of a policy."""

from __future__ import annotations

import pytest
import torch
from bench.studies.adamoe import training
from bench.studies.adamoe.skills import SkillRobot, demonstrate
from bench.studies.adamoe.training import decoupling, gradient_conflict, lesson, roll_out
from bench.studies.trainer import train_steps
from tests.zoo.adamoe.test_policy import small


def test_every_skill_needs_other_actions():
    point, goal = torch.tensor([[0.0, 0.0]]).repeat(4, 1), torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    env = SkillRobot(torch.arange(4), goal, point, num_skills=4)
    # A quarter turn a skill; odd ones mirror the second number of the action as well.
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(env.optimal(), wanted, atol=1e-6, rtol=0)
    states = env.step(env.optimal())
    torch.testing.assert_close(states[:, :2], torch.tensor([[0.2, 0.0]]).repeat(4, 1))
    for _ in range(6):
        env.step(env.optimal())
    torch.testing.assert_close(env.distance(), torch.zeros(4), atol=1e-6, rtol=0)
    assert torch.equal(env.reset()[:, :2], point)


def test_a_teacher_reaches_every_goal():
    env = SkillRobot.sample(64, generator=torch.Generator().manual_seed(0))
    policy = small("dense")
    plan = []

    def act(states, skills, generator=None):
        plan.append(len(plan))
        # The teacher's next actions from here, in a copy of the environment.
        copy = SkillRobot(skills, states[:, 2:], states[:, :2], num_skills=8)
        actions = []
        for _ in range(4):
            actions.append(copy.optimal())
            copy.step(actions[-1])
        return torch.stack(actions, dim=1)

    policy.act = act
    assert roll_out(policy, env, progress=False).all() and len(plan) == 4
    demonstrations = demonstrate(64, 4, generator=torch.Generator().manual_seed(0))
    fresh = SkillRobot.sample(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(demonstrations.actions, act(fresh.reset(), fresh.skills))


def test_decoupling():
    data = demonstrate(32, 4)
    assert decoupling(small("coupled"), data)["correlation"] == pytest.approx(1.0)
    policy = small("additive", init_std=0.5)
    found = decoupling(policy, data)
    assert -1 <= found["correlation"] < 0.999 and found["max_violation"] >= 0
    assert -1 <= gradient_conflict(policy, data) <= 1
    with pytest.raises(ValueError, match="model must be sparse"):
        decoupling(small("dense"), data)


def test_three_groups():
    policy = small()
    base, experts, routers = training.groups_of(policy, 1e-3, 2e-3, 50, 5)
    assert len(experts.parameters) == 4 and len(routers.parameters) == 3
    count = sum(len(g.parameters) for g in (base, experts, routers))
    assert count == len(list(policy.parameters()))
    assert (base.rate, routers.rate, experts.warm_up, routers.warm_up) == (1e-3, 2e-3, 50, 5)


def test_balance_weight_changes_after_the_early_steps():
    policy = small(balance_weight=0.5)
    taught = lesson(
        policy, lambda g: demonstrate(16, 4, generator=g), early_steps=2, late_balance_weight=0.25
    )
    history = train_steps("policy", policy, *taught, steps=4, progress=False)
    weights = [
        (loss - action) / balance
        for loss, action, balance in zip(
            history["loss"], history["action"], history["balance"], strict=True
        )
    ]
    assert weights == pytest.approx([0.5, 0.5, 0.25, 0.25], rel=1e-3)
    assert min(history["z"]) > 0
