"""Manipulation task in small: a point that is pushed to a goal with one of several skills.

A skill rotates the actions by its own angle, and every second one mirrors them as well.
Observations are the point, the goal and the skill; each skill needs different actions in a given
state. Letters: N environments, C actions of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..t2mir.envs import PointRobot

STATE_SIZE, ACTION_SIZE = 4, 2
REACHED = 0.1


class Demonstrations(NamedTuple):
    """Teacher demonstrations. states [N, 4]: point and goal. skills [N]. actions [N, C, 2]."""

    states: Tensor
    skills: Tensor
    actions: Tensor


class SkillRobot:
    """N points in [-1.5, 1.5]^2, each with a goal on the unit circle and a skill.

    Args:
        skills: [N] int in [0, num_skills).
        goals, points: [N, 2]; points are the start positions.
        num_skills: number of skills. horizon: steps of an episode.
    """

    def __init__(
        self, skills: Tensor, goals: Tensor, points: Tensor, *, num_skills: int, horizon: int = 16
    ) -> None:
        self.skills, self.points, self.horizon = skills, points, horizon
        angles = 2 * math.pi * skills / num_skills
        self.robot = PointRobot(goals, angles, horizon=horizon)
        # Mirrors: [1, -1] for odd skills.
        self.mirror = torch.stack([torch.ones_like(angles), 1.0 - 2.0 * (skills % 2)], dim=-1)
        self.reset()

    @classmethod
    def sample(
        cls, count: int, num_skills: int = 8, generator: torch.Generator | None = None
    ) -> SkillRobot:
        skills = torch.arange(count) % num_skills
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        points = 3 * torch.rand(count, 2, generator=generator) - 1.5
        goals = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return cls(skills, goals, points, num_skills=num_skills)

    def reset(self) -> Tensor:
        """Returns states [N, 4] of a new episode."""
        self.robot.state = self.points.clone()
        return self.states

    @property
    def states(self) -> Tensor:
        return torch.cat([self.robot.state, self.robot.goals], dim=-1)

    def step(self, actions: Tensor) -> Tensor:
        """Applies actions [N, 2], of length at most 1; returns the next states."""
        self.robot.step(actions * self.mirror)
        return self.states

    def optimal(self) -> Tensor:
        """Returns the teacher's actions [N, 2]: straight to the goal."""
        return self.robot.optimal() * self.mirror

    def distance(self) -> Tensor:
        """Returns the distances [N] from the goals."""
        return (self.robot.state - self.robot.goals).norm(dim=-1)


def demonstrate(
    count: int, chunk: int, num_skills: int = 8, generator: torch.Generator | None = None
) -> Demonstrations:
    """Returns the teacher's demonstrations from `count` random states, `chunk` actions each."""
    env = SkillRobot.sample(count, num_skills, generator)
    states = env.reset()
    actions = []
    for _ in range(chunk):
        actions.append(env.optimal())
        env.step(actions[-1])
    return Demonstrations(states, env.skills, torch.stack(actions, dim=1))
