"""Environments with hidden tasks, histories, gymnasium."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from bench.studies.t2mir.envs import DarkRoom, GymnasiumEnvs, PointRobot, collect, to_gymnasium
from bench.studies.t2mir.training import play
from tests.zoo.t2mir.common import make

has_gymnasium = importlib.util.find_spec("gymnasium") is not None

gymnasium_only = pytest.mark.skipif(not has_gymnasium, reason="gymnasium is not installed")


def test_point_robot_turns_actions_and_pays_distance():
    angle = torch.tensor([0.0, math.pi / 2])
    env = PointRobot(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), angle, step_size=0.5)
    state, reward = env.step(torch.tensor([[1.0, 0.0], [4.0, 0.0]]))
    torch.testing.assert_close(state, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    torch.testing.assert_close(reward, torch.tensor([-0.5, -0.5]))
    assert torch.equal(env.reset(), torch.zeros(2, 2))


@pytest.mark.parametrize("kind", [PointRobot, DarkRoom])
def test_teachers_reach_the_goal_in_every_task(kind):
    env = kind.sample(64, generator=torch.Generator().manual_seed(0), horizon=24)
    best = collect(env, 2, skill=lambda _: 1.0, progress=False)
    other = collect(env, 2, skill=lambda _: 0.0, progress=False)
    assert torch.equal(best.actions, best.optimal)
    assert (best.returns > other.returns).float().mean() > 0.9
    if kind is PointRobot:
        assert (best.rewards[:, 0, 6:].abs() < 1e-5).all()  # five steps of 0.2 away
    else:
        assert (best.rewards[:, 0, 10:] == 1).all()  # at most ten cells away


def test_dark_room_orders_and_walls():
    orders = torch.tensor([[4, 0, 1, 2, 3]])
    env = DarkRoom(torch.tensor([[6, 5]]), orders, size=7)
    assert env.reset().tolist() == [[0.0, 0.0]]
    for cell, pay in ((4, 0.0), (5, 0.0), (6, 0.0), (6, 0.0)):
        _, reward = env.step(torch.tensor([0]))  # right
        assert env.cell[0].tolist() == [cell, 3] and reward.tolist() == [pay]
    assert env.optimal().tolist() == [2]  # up
    for _ in range(2):
        _, reward = env.step(env.optimal())
    assert reward.tolist() == [1.0]
    assert env.optimal().tolist() == [1]  # stay


def test_histories_rise_and_repeat():
    env = PointRobot.sample(50, generator=torch.Generator().manual_seed(1), horizon=12)
    data, again = (
        collect(env, 6, generator=torch.Generator().manual_seed(2), progress=False)
        for _ in range(2)
    )
    assert data.states.shape == (50, 6, 12, 2) and data.rewards.shape == (50, 6, 12)
    assert torch.equal(data.states, again.states)
    rising = data.returns.mean(0)
    assert (rising[1:] > rising[:-1]).all()
    # What is stored is what happened: replaying the actions gives the rewards.
    env.reset()
    for t in range(12):
        assert torch.equal(env.state, data.states[:, 3, t])
        _, reward = env.step(data.actions[:, 3, t])
        assert torch.equal(reward, data.rewards[:, 3, t])


def test_a_moved_environment_is_the_same():
    generator = torch.Generator().manual_seed(1)
    robot = PointRobot.sample(10, horizon=5, step_size=0.3, generator=generator)
    room = DarkRoom.sample(10, size=4, horizon=7, generator=generator)
    for env in (robot, room):
        moved = env.to("cpu")
        assert moved is not env and moved.horizon == env.horizon
        for _ in range(3):
            action = env.random(generator)
            a, b = env.step(action), moved.step(action)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            assert torch.equal(env.optimal(), moved.optimal())


@gymnasium_only
@pytest.mark.parametrize("kind", [PointRobot, DarkRoom])
def test_gymnasium_there_and_back(kind):
    from gymnasium.utils.env_checker import check_env

    tasks = kind.sample(3, generator=torch.Generator().manual_seed(1), horizon=7)
    singles = [to_gymnasium(tasks.take(torch.tensor([i]))) for i in range(3)]
    check_env(singles[0], skip_render_check=True)
    back = GymnasiumEnvs(singles, 7)
    assert back.num_actions == kind.num_actions and back.state_size == 2
    torch.testing.assert_close(back.reset(), tasks.reset())
    for _ in range(7):
        action = tasks.random()
        for ours, theirs in zip(tasks.step(action), back.step(action), strict=True):
            torch.testing.assert_close(ours, theirs)
    state, reward = back.step(tasks.random())  # after the end
    assert torch.equal(state, back._states) and not reward.any()
    model = make(num_actions=kind.num_actions)
    torch.testing.assert_close(
        play(model, back, 2, progress=False), play(model, tasks, 2, progress=False)
    )


def test_without_gymnasium_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install torch-moe-ops\[studies\]"):
        to_gymnasium(PointRobot.sample(1))
