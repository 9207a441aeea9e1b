"""Environments with hidden tasks, many at once in torch, and histories of learners in them.

Letters: N environments, H horizon, S state size, A action size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..progress import bar


class VectorEnv(Protocol):
    """N environments that step together and end together after `horizon` steps.

    num_actions is 0 for continuous actions in [-1, 1]^action_size.
    """

    num_envs: int
    horizon: int
    state_size: int
    num_actions: int
    action_size: int

    def reset(self) -> Tensor:
        """States [N, S] of a new episode, in the same tasks."""
        ...

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """[N] or [N, A] to the next states [N, S] and rewards [N]."""
        ...

    def optimal(self) -> Tensor:
        """Best actions of the present states: a teacher that knows the tasks."""
        ...

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions drawn uniformly."""
        ...


class PointRobot:
    """A point that should go to a hidden place, with its actions turned by a hidden angle.

    A step moves the point by step_size * R action, with action shortened to length 1 and R the
    task's rotation. Reward: minus the distance to the goal after the step. Episodes start in the
    origin.

    Args:
        goals: [N, 2]. angles: [N] in radians; None for no rotation.
        horizon: steps of an episode. step_size: largest move.
    """

    state_size, action_size, num_actions = 2, 2, 0

    def __init__(
        self,
        goals: Tensor,
        angles: Tensor | None = None,
        *,
        horizon: int = 20,
        step_size: float = 0.2,
    ) -> None:
        if goals.dim() != 2 or goals.shape[1] != 2:
            raise ValueError(f"PointRobot: goals must be [N, 2], got shape {list(goals.shape)}.")
        self.goals = goals
        self.angles = torch.zeros_like(goals[:, 0]) if angles is None else angles
        self.num_envs, self.horizon, self.step_size = goals.shape[0], horizon, step_size
        cos, sin = self.angles.cos(), self.angles.sin()
        self.rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)
        self.state = torch.zeros_like(goals)

    @classmethod
    def sample(
        cls,
        num_tasks: int,
        *,
        num_rotations: int = 4,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> PointRobot:
        """Tasks with goals on the unit circle and one of `num_rotations` equally spaced angles."""
        phi = 2 * math.pi * torch.rand(num_tasks, generator=generator)
        kind = torch.randint(num_rotations, (num_tasks,), generator=generator)
        goals = torch.stack([phi.cos(), phi.sin()], dim=-1)
        return cls(goals, 2 * math.pi * kind / num_rotations, **settings)

    def take(self, tasks: Tensor) -> PointRobot:
        """Environments of some of the tasks, by number."""
        return self._like(self.goals[tasks], self.angles[tasks])

    def to(self, device: torch.device | str) -> PointRobot:
        """Returns the same tasks on another device."""
        return self._like(self.goals.to(device), self.angles.to(device))

    def _like(self, goals: Tensor, angles: Tensor) -> PointRobot:
        return PointRobot(goals, angles, horizon=self.horizon, step_size=self.step_size)

    def reset(self) -> Tensor:
        self.state = torch.zeros_like(self.goals)
        return self.state

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        move = _shorten(actions)
        self.state = self.state + self.step_size * (self.rotation @ move[..., None])[..., 0]
        return self.state, -(self.state - self.goals).norm(dim=-1)

    def optimal(self) -> Tensor:
        way = (self.goals - self.state) / self.step_size
        return _shorten((self.rotation.transpose(1, 2) @ way[..., None])[..., 0])

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        return 2 * torch.rand(self.num_envs, 2, generator=generator).to(self.goals) - 1


def _shorten(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True).clamp(min=1)


class DarkRoom:
    """A grid in which one hidden cell pays 1 a step, with the five actions hidden behind an order.

    Moves: stay, up, down, left, right; walls stop. A state is the cell's two coordinates, scaled to
    [-1, 1]. Episodes start in the middle.

    Args:
        goals: [N, 2] cells in [0, size).
        orders: [N, 5], permutations: action a makes move orders[n, a]; None for the order above.
        size: cells a side. horizon: steps of an episode.
    """

    state_size, action_size, num_actions = 2, 1, 5

    def __init__(
        self,
        goals: Tensor,
        orders: Tensor | None = None,
        *,
        size: int = 10,
        horizon: int = 100,
    ) -> None:
        if (
            goals.dim() != 2
            or goals.shape[1] != 2
            or bool((goals < 0).any() | (goals >= size).any())
        ):
            raise ValueError(
                f"DarkRoom: goals must be [N, 2] in [0, {size}), got shape {list(goals.shape)}."
            )
        self.goals = goals.long()
        every = torch.arange(5, device=goals.device).expand(goals.shape[0], -1)
        self.orders = every if orders is None else orders
        if not torch.equal(self.orders.sort(-1).values, every):
            raise ValueError(
                f"DarkRoom: orders must be [{goals.shape[0]}, 5], each row a permutation, got "
                f"shape {list(self.orders.shape)}."
            )
        self.num_envs, self.size, self.horizon = goals.shape[0], size, horizon
        self.moves = torch.tensor([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]], device=goals.device)
        self.cell = torch.full_like(self.goals, size // 2)

    @classmethod
    def sample(
        cls,
        num_tasks: int,
        *,
        permute: bool = True,
        size: int = 10,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> DarkRoom:
        """Tasks with goals anywhere and, with `permute`, random orders of the actions."""
        goals = torch.randint(size, (num_tasks, 2), generator=generator)
        orders = None
        if permute:
            orders = torch.rand(num_tasks, 5, generator=generator).argsort(-1)
        return cls(goals, orders, size=size, **settings)

    def take(self, tasks: Tensor) -> DarkRoom:
        """Environments of some of the tasks, by number."""
        return DarkRoom(self.goals[tasks], self.orders[tasks], size=self.size, horizon=self.horizon)

    def to(self, device: torch.device | str) -> DarkRoom:
        """Returns the same tasks on another device."""
        goals, orders = self.goals.to(device), self.orders.to(device)
        return DarkRoom(goals, orders, size=self.size, horizon=self.horizon)

    def _state(self) -> Tensor:
        return 2 * self.cell.float() / (self.size - 1) - 1

    def reset(self) -> Tensor:
        self.cell = torch.full_like(self.goals, self.size // 2)
        return self._state()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        move = self.orders.gather(1, actions.long()[:, None])[:, 0]
        self.cell = (self.cell + self.moves[move]).clamp(0, self.size - 1)
        return self._state(), (self.cell == self.goals).all(-1).float()

    def optimal(self) -> Tensor:
        way = self.goals - self.cell
        sideways = torch.where(way[:, 0] < 0, 3, 4)
        along = torch.where(way[:, 1] > 0, 1, 2)
        move = torch.where(way[:, 0] != 0, sideways, torch.where(way[:, 1] != 0, along, 0))
        return (self.orders == move[:, None]).long().argmax(-1)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(5, (self.num_envs,), generator=generator).to(self.goals.device)


@dataclass
class Histories:
    """Episodes of a learner in each of N tasks, from its first to its last.

    states [N, episodes, H, S]; actions and optimal [N, episodes, H] int or [N, episodes, H, A];
    rewards [N, episodes, H]. `optimal` is what a teacher would have done in each state.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    optimal: Tensor

    @property
    def returns(self) -> Tensor:
        """[N, episodes]."""
        return self.rewards.sum(-1)

    def take(self, tasks: Tensor | slice) -> Histories:
        """Those of some tasks."""
        return Histories(
            self.states[tasks], self.actions[tasks], self.rewards[tasks], self.optimal[tasks]
        )

    def to(self, device: torch.device | str) -> Histories:
        """Returns the same histories on another device."""
        parts = (self.states, self.actions, self.rewards, self.optimal)
        return Histories(*(t.to(device) for t in parts))


def collect(
    env: VectorEnv,
    episodes: int = 20,
    *,
    skill: Callable[[int], float] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Histories:
    """Histories of a learner that follows the teacher ever more often, in all N tasks at once.

    In episode i each action is the teacher's with probability skill(i), else a random one. By
    default skill rises evenly from 0 to 1. It stands in for the training runs of an agent a task,
    which several thousand tasks would make long.
    """
    if episodes < 1:
        raise ValueError(f"collect: episodes must be at least 1, got {episodes}.")
    rise = skill or (lambda i: i / max(episodes - 1, 1))
    parts: list[list[Tensor]] = [[], [], [], []]
    with bar(episodes, f"collect {env.num_envs} tasks", progress) as shown:
        for episode in range(episodes):
            state = env.reset()
            for _ in range(env.horizon):
                best, other = env.optimal(), env.random(generator)
                expert = torch.rand(env.num_envs, generator=generator) < rise(episode)
                expert = expert.to(best.device).view(-1, *[1] * (best.dim() - 1))
                action = torch.where(expert, best, other)
                after, reward = env.step(action)
                for part, t in zip(parts, (state, action, reward, best), strict=True):
                    part.append(t)
                state = after
            shown.update()
    shape = (episodes, env.horizon)
    return Histories(*(torch.stack(part, dim=1).unflatten(1, shape) for part in parts))


# ------------------------------------------------------------------------------- gymnasium


def to_gymnasium(env: VectorEnv) -> Any:
    """A gymnasium.Env of a vector environment with one task.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: more than one task.
    """
    gymnasium = _gymnasium()
    if env.num_envs != 1:
        raise ValueError(f"to_gymnasium: env must have one task, got {env.num_envs}.")

    class Single(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Box(-math.inf, math.inf, (env.state_size,))
        action_space = (
            gymnasium.spaces.Discrete(env.num_actions)
            if env.num_actions
            else gymnasium.spaces.Box(-1.0, 1.0, (env.action_size,))
        )

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            self.steps = 0
            states = env.reset()
            self.device = states.device
            return states[0].cpu().numpy(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            self.steps += 1
            given = torch.as_tensor(action, device=self.device)[None]
            state, reward = env.step(given if env.num_actions else given.float())
            return state[0].cpu().numpy(), float(reward[0]), False, self.steps >= env.horizon, {}

    return Single()


class GymnasiumEnvs:
    """Several gymnasium environments, one per task, as a vector environment that can be played.

    An environment that ends early stays in its last state with reward 0 until all have ended.
    There is no teacher: `optimal` raises, so `collect` needs a skill of 0 and `evaluate` works.

    Args:
        envs: with a Box observation of one dimension and Discrete or one-dimensional Box actions,
            the latter scaled from [-1, 1] to their bounds.
        horizon: steps of an episode.
    """

    def __init__(self, envs: Sequence[Any], horizon: int) -> None:
        self._gym = _gymnasium()
        self.envs = list(envs)
        spaces = self._gym.spaces
        first = self.envs[0]
        self.num_envs, self.horizon = len(self.envs), horizon
        self.state_size = first.observation_space.shape[0]
        self._space = first.action_space
        discrete = isinstance(self._space, spaces.Discrete)
        self.num_actions = int(self._space.n) if discrete else 0
        self.action_size = 1 if discrete else self._space.shape[0]
        self._ended = [False] * self.num_envs
        self._states = torch.zeros(self.num_envs, self.state_size)

    def reset(self) -> Tensor:
        self._ended = [False] * self.num_envs
        self._states = torch.stack([_tensor(env.reset()[0]) for env in self.envs])
        return self._states

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        states, rewards = self._states.clone(), torch.zeros(self.num_envs)
        for i, env in enumerate(self.envs):
            if self._ended[i]:
                continue
            if self.num_actions:
                action: Any = int(actions[i])
            else:
                low, high = self._space.low, self._space.high
                action = low + (actions[i].clamp(-1, 1).cpu().numpy() + 1) / 2 * (high - low)
            state, reward, terminated, truncated, _ = env.step(action)
            states[i], rewards[i] = _tensor(state), float(reward)
            self._ended[i] = terminated or truncated
        self._states = states
        return states, rewards

    def optimal(self) -> Tensor:
        raise NotImplementedError("GymnasiumEnvs: there is no teacher that knows the best action.")

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        if self.num_actions:
            return torch.randint(self.num_actions, (self.num_envs,), generator=generator)
        return 2 * torch.rand(self.num_envs, self.action_size, generator=generator) - 1


def _tensor(state: Any) -> Tensor:
    return torch.as_tensor(state, dtype=torch.float32)


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ImportError(
            "bench.studies: this environment needs gymnasium, which is not installed: "
            "pip install torch-moe-ops[studies]"
        ) from error
    return gymnasium
