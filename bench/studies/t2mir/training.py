"""Training T2MIR on histories, and playing it in environments it has not seen.

Letters: B sequences, S steps of context, N tasks, H horizon.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.zoo.t2mir.model import T2MIR, action_loss

from ..progress import bar
from ..trainer import Group, train_steps
from .envs import Histories, VectorEnv


class Batch(NamedTuple):
    """states [B, S, .], actions, rewards; query [B, .] or None; target of every prediction."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    query: Tensor | None
    target: Tensor


def sample_ad(
    data: Histories, tasks: Tensor, episodes: int, generator: torch.Generator | None = None
) -> Batch:
    """For each task, two contexts of `episodes` different episodes, by rising return.

    Rows i and i + len(tasks) are of one task and share no episode (where it has 2 * episodes).
    The target is the action taken: algorithm distillation imitates the learner.
    """
    count, device = data.states.shape[1], data.states.device
    draws = 2 * episodes
    order = torch.rand(len(tasks), count, generator=generator).argsort(-1)
    if count < draws:
        again = torch.rand(len(tasks), count, generator=generator).argsort(-1)
        order = torch.cat([order[:, :episodes], again[:, :episodes]], dim=1)
    chosen = torch.cat([order[:, :episodes], order[:, episodes:draws]]).to(device)
    rows = tasks.repeat(2)[:, None].to(device)
    rank = data.returns[rows, chosen].argsort(dim=-1, stable=True)
    chosen = chosen.gather(1, rank)
    states, actions, rewards = (
        t[rows, chosen].flatten(1, 2) for t in (data.states, data.actions, data.rewards)
    )
    return Batch(states, actions, rewards, None, actions)


def sample_dpt(data: Histories, tasks: Tensor, generator: torch.Generator | None = None) -> Batch:
    """For each task, two prompts of one episode each, and a query state from another.

    The target, at every position, is the teacher's action in the query state.
    """
    (count, horizon), device = data.states.shape[1:3], data.states.device
    order = torch.rand(len(tasks), max(count, 2), generator=generator).argsort(-1) % count
    prompt = torch.cat([order[:, 0], order[:, 1]]).to(device)
    rows = tasks.repeat(2).to(device)
    query_episode = torch.randint(count, (len(rows),), generator=generator).to(device)
    step = torch.randint(horizon, (len(rows),), generator=generator).to(device)
    query = data.states[rows, query_episode, step]
    best = data.optimal[rows, query_episode, step]
    target = best[:, None].expand(-1, horizon + 1, *best.shape[1:])
    return Batch(
        data.states[rows, prompt],
        data.actions[rows, prompt],
        data.rewards[rows, prompt],
        query,
        target,
    )


def fit(
    model: T2MIR,
    data: Histories,
    *,
    steps: int = 1000,
    batch_size: int = 32,
    episodes: int = 4,
    lr: float = 3e-4,
    weight_decay: float = 1e-4,
    warm_up: int = 100,
    balance_weight: float = 0.1,
    contrastive_weight: float = 0.01,
    grad_clip: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    watch: Callable[[int], None] | None = None,
    every: int = 0,
    checkpoint: str | Path | None = None,
) -> dict[str, list[float]]:
    """Trains with AdamW: warm-up, then a cosine to 0.

    A batch is batch_size / 2 tasks without repeats, each twice. The loss is imitation +
    balance_weight * balance + contrastive_weight * contrast; with contrastive_weight 0 the contrast
    is not computed.

    Args:
        model: its max_steps must hold `episodes` horizons ("ad") or one ("dpt"). On the device of
            the data, which may be any.
        batch_size: even; at most twice the number of tasks.
        episodes: of a context ("ad").
        seed: of the batches; dropout and router noise come from torch's generator.
        watch: called with the number of steps done every `every` steps (0: never) and at the end;
            it may put the model into eval mode.
        checkpoint: a file that is written after each call of `watch`. Where it is there already,
            training goes on from it, with the numbers of a run that was not cut; the other
            arguments must be those of that run.

    Returns:
        By step: "loss", "imitation", "balance", "contrastive".

    Raises:
        ValueError: a bad batch size, a context too long, or a loss that is not finite.
    """
    num_tasks = data.states.shape[0]
    if batch_size % 2 or not 2 <= batch_size <= 2 * num_tasks:
        raise ValueError(
            f"fit: batch_size must be even and in [2, {2 * num_tasks}], got {batch_size}."
        )
    config = model.config
    contrast = contrastive_weight > 0 and hasattr(model.experts, "contrast")

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        tasks = torch.randperm(num_tasks, generator=generator)[: batch_size // 2]
        if config.variant == "ad":
            batch = sample_ad(data, tasks, episodes, generator)
        else:
            batch = sample_dpt(data, tasks, generator)
        output = model(*batch[:4], contrastive=contrast)
        imitation = action_loss(output.actions, batch.target, config.num_actions)
        total = (
            imitation
            + balance_weight * output.balance_loss
            + contrastive_weight * output.contrastive_loss
        )
        return {
            "loss": total,
            "imitation": imitation,
            "balance": output.balance_loss,
            "contrastive": output.contrastive_loss,
        }

    parameters = [p for p in model.parameters() if p.requires_grad]
    return train_steps(
        f"fit t2mir {config.variant}",
        model,
        [Group(parameters, lr, warm_up, weight_decay)],
        loss,
        steps=steps,
        seed=seed,
        grad_clip=grad_clip,
        checkpoint=checkpoint,
        every=every or steps,
        watch=watch,
        after=model.update_target,
        progress=progress,
    )


@torch.no_grad()
def play(
    model: T2MIR,
    env: VectorEnv,
    episodes: int = 4,
    *,
    explore: int = 0,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Returns [N, episodes] of a model that meets the tasks for the first time and does not learn.

    "ad": the context is its own last episodes, as many as max_steps holds, and the present one.
    "dpt": the query is the present state and the prompt its own last episode; nothing in the first.
    Discrete actions are the most likely ones.

    In the first `explore` episodes actions are random, of the generator: a model of continuous
    actions that knows nothing yet takes their mean, stands still and learns little of the task.
    """
    config = model.config
    if (config.num_actions, config.state_size) != (env.num_actions, env.state_size):
        raise ValueError(
            f"play: env must have {config.num_actions} actions and states of {config.state_size} "
            f"like the model, got {env.num_actions} and {env.state_size}."
        )
    if env.horizon > config.max_steps:
        raise ValueError(
            f"play: env must have a horizon of at most {config.max_steps}, got {env.horizon}."
        )
    before = model.training
    model.eval()
    kept = config.max_steps // env.horizon - 1 if config.variant == "ad" else 1
    past: list[tuple[Tensor, Tensor, Tensor]] = []
    returns = []
    try:
        with bar(episodes * env.horizon, f"play {env.num_envs} tasks", progress) as shown:
            for episode in range(episodes):
                state = env.reset()
                empty = _no_steps(model, state)
                context = [torch.cat(t, dim=1) for t in zip(empty, *past, strict=True)]
                now = list(empty)
                for _ in range(env.horizon):
                    if episode < explore:
                        action = env.random(generator)
                    else:
                        action = _act(model, context, now, state)
                    after, reward = env.step(action)
                    step = (state, action, reward)
                    now = [torch.cat([a, b[:, None]], 1) for a, b in zip(now, step, strict=True)]
                    state = after
                    shown.update()
                returns.append(now[2].sum(1))
                past = [*past, (now[0], now[1], now[2])][-kept:] if kept else []
    finally:
        model.train(before)
    return torch.stack(returns, dim=1)


def _no_steps(model: T2MIR, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    config, batch = model.config, state.shape[0]
    if config.num_actions:
        actions = torch.zeros(batch, 0, dtype=torch.long, device=state.device)
    else:
        actions = state.new_zeros(batch, 0, config.action_size)
    return state.new_zeros(batch, 0, config.state_size), actions, state.new_zeros(batch, 0)


def _act(model: T2MIR, context: list[Tensor], now: list[Tensor], state: Tensor) -> Tensor:
    if model.config.variant == "dpt":
        output = model(*context, state)
    else:
        # The present step's action and reward are not known; nothing before them reads them.
        states, actions, rewards = (torch.cat([a, b], 1) for a, b in zip(context, now, strict=True))
        unknown = actions.new_zeros(state.shape[0], 1, *actions.shape[2:])
        output = model(
            torch.cat([states, state[:, None]], 1),
            torch.cat([actions, unknown], 1),
            torch.cat([rewards, rewards.new_zeros(state.shape[0], 1)], 1),
        )
    last = output.actions[:, -1]
    return last.argmax(-1) if model.config.num_actions else last
