"""One arm of the T2MIR experiment with one seed: what it is trained on, and what is measured."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.studies.study import Run
from bench.studies.t2mir.ablations import Ablation, AblationConfig
from bench.studies.t2mir.envs import Histories, PointRobot, collect
from bench.studies.t2mir.training import (
    Batch,
    fit,
    play,
    sample_ad,
    sample_dpt,
)
from moe_ops._state import read_state, write_state
from moe_ops.layers import Experts
from moe_ops.zoo.t2mir import T2MIR, T2MIRConfig, action_loss
from moe_ops.zoo.t2mir.routers import TaskRouter


@dataclass(frozen=True)
class Scale:
    """The size of everything: the same experiment runs in minutes and for days.

    Attributes:
        model: of the arms with experts; its max_steps follows from horizon and context.
        train, valid, test: numbers of tasks.
        rotations, horizon, step_size: of the environment.
        histories: episodes collected a task. context: of them, in one sequence ("ad").
        steps, batch, rate, weight_decay, warm_up, balance: of training.
        every: steps between two looks at the validation tasks.
        played: episodes played in each test task.
        note: what was tried before this setting, for the report.
    """

    model: T2MIRConfig
    train: int = 2000
    valid: int = 500
    test: int = 500
    rotations: int = 4
    horizon: int = 6
    step_size: float = 0.25
    histories: int = 8
    context: int = 2
    steps: int = 800
    batch: int = 48
    rate: float = 3e-3
    weight_decay: float = 1e-4
    warm_up: int = 50
    balance: float = 0.01
    every: int = 200
    played: int = 4
    note: str = ""

    def config(self, moe: str) -> AblationConfig:
        episodes = self.context if self.model.variant == "ad" else 1
        changes = {"moe": moe, "max_steps": episodes * self.horizon}
        return AblationConfig(**{**vars(self.model), **changes})


SMALL = Scale(
    T2MIRConfig(variant="dpt", hidden_size=32, num_layers=2, dropout=0.0),
    note="the rate: of the dense model at 8 steps of at most 0.2, 4000 tasks, batch 64, 1200 "
    "training steps, seed 0, action loss 0.159 at 1e-3 and 0.147 at 3e-3 on unseen tasks; "
    "nothing else was searched. Playing without a first random episode left its returns at -8.0 "
    "to -5.2, for it stands still while it knows nothing",
)


@dataclass(frozen=True)
class Arm:
    """The kind of the last layer, the weight of the contrastive loss, and how tasks are routed."""

    moe: str
    weight: float = 0.0
    routing: str = "causal"


WEIGHTS = (0.0, 0.01, 0.1)
ARMS: dict[str, Arm] = {
    "dense": Arm("none"),
    **{f"experts, contrast {w:g}": Arm("both", w) for w in WEIGHTS},
}
# Routed by the tokens so far, and, as published, by those to come too.
ROUTED_ARMS: dict[str, Arm] = {
    "dense": Arm("none"),
    **{
        f"{routing}, contrast {w:g}": Arm("both", w, routing)
        for routing in ("causal", "sequence")
        for w in (0.0, 0.1)
    },
}
UNTRAINED = "untrained experts"
NEIGHBORS, FRESH_ROUTERS = 10, 5
COLUMNS = (
    "action loss",
    "return",
    "rotation by router",
    "rotation by fresh routers",
    "rotation by features",
    "goal error by router",
    "goal error by fresh routers",
    "goal error by features",
)
ACTION_LOSS, RETURN, ROTATION, ROTATION_FRESH, ROTATION_FEATURES, GOAL, GOAL_FRESH, _ = COLUMNS


@dataclass
class Tasks:
    """Histories of the three sets of tasks, and the environments of the last two."""

    train: Histories
    valid: Histories
    test: Histories
    valid_env: PointRobot
    test_env: PointRobot


def draw(scale: Scale, seed: int, device: str) -> Tasks:
    generator = torch.Generator().manual_seed(seed)
    found: list[Histories] = []
    envs = []
    for count in (scale.train, scale.valid, scale.test):
        env = PointRobot.sample(
            count,
            num_rotations=scale.rotations,
            horizon=scale.horizon,
            step_size=scale.step_size,
            generator=generator,
        )
        data = collect(env, scale.histories, generator=generator, progress=False)
        found.append(data.to(device))
        envs.append(env.to(device))
    return Tasks(found[0], found[1], found[2], envs[1], envs[2])


def contexts(scale: Scale, data: Histories) -> Batch:
    """Two contexts of each task, the same ones for every arm."""
    tasks = torch.arange(data.states.shape[0])
    generator = torch.Generator().manual_seed(0)
    if scale.model.variant == "dpt":
        return sample_dpt(data, tasks, generator)
    return sample_ad(data, tasks, scale.context, generator)


@dataclass
class Seen:
    """The output of a model for contexts: action loss, features [B, L, H] that its last layer
    reads, and the task router's representation [B, E], None without one."""

    loss: float
    features: Tensor
    representation: Tensor | None


@torch.no_grad()
def look(model: T2MIR, batch: Batch) -> Seen:
    features: list[Tensor] = []
    hook = model.experts.norm.register_forward_hook(
        lambda module, args, output: features.append(output)
    )
    try:
        output = model.eval()(*batch[:4])
    finally:
        hook.remove()
    loss = action_loss(output.actions, batch.target, model.config.num_actions)
    return Seen(loss.item(), features[0], output.representation)


def neighbors(known: Tensor, asked: Tensor) -> Tensor:
    """Numbers of the nearest of `known` [M, E] to each of `asked` [N, E], [N, NEIGHBORS]."""
    mean, scale = known.mean(0), known.std(0).clamp(min=1e-6)
    return (
        torch.cdist((asked - mean) / scale, (known - mean) / scale)
        .topk(min(NEIGHBORS, len(known)), largest=False)
        .indices
    )


def told(known: Tensor, asked: Tensor, known_env: PointRobot, asked_env: PointRobot) -> list[float]:
    """Measures how well neighbors tell the task: share of right rotations, mean error of the goal
    in degrees. Rows are two contexts of each task, see `contexts`."""
    near = neighbors(known, asked)
    angles = known_env.angles.repeat(2)[near]
    kinds = known_env.angles.unique()
    votes = (angles[..., None] == kinds).sum(1).argmax(-1)
    right = kinds[votes] == asked_env.angles.repeat(2)
    middle = F.normalize(known_env.goals.repeat(2, 1)[near].mean(1), dim=-1)
    cosine = (middle * F.normalize(asked_env.goals.repeat(2, 1), dim=-1)).sum(-1)
    error = torch.rad2deg(cosine.clamp(-1, 1).acos())
    return [right.float().mean().item(), error.mean().item()]


@dataclass
class Result:
    """One arm with one seed: its row, returns by episode, validation losses by step, and points
    of test contexts in the router's plane with their rotations."""

    row: list[float | None]
    returns: list[float]
    valid: dict[str, float] = field(default_factory=dict)
    points: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def measure(model: T2MIR, tasks: Tasks, scale: Scale, seed: int) -> Result:
    known = look(model, contexts(scale, tasks.valid))
    asked = look(model, contexts(scale, tasks.test))
    envs = (tasks.valid_env, tasks.test_env)
    by_router: Sequence[float | None] = (None, None)
    points: list[list[float]] = []
    if known.representation is not None and asked.representation is not None:
        by_router = told(known.representation, asked.representation, *envs)
        points = plane(asked.representation, tasks.test_env)
    config = scale.config("both")
    fresh = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(FRESH_ROUTERS):
            router = TaskRouter(config.hidden_size, config.task_experts, config.task_top_k)
            router.to(known.features.device)
            pair = (router.represent(router.gate(t)) for t in (known.features, asked.features))
            fresh.append(told(*pair, *envs))
    by_fresh = [sum(numbers) / len(fresh) for numbers in zip(*fresh, strict=True)]
    by_features = told(known.features.mean(1), asked.features.mean(1), *envs)
    generator = torch.Generator().manual_seed(seed)
    played = play(
        model, tasks.test_env, scale.played, explore=1, generator=generator, progress=False
    )
    returns = played.mean(0).tolist()
    row: list[float | None] = [asked.loss, returns[-1]]
    for i in range(2):
        row += [by_router[i], by_fresh[i], by_features[i]]
    return Result(row, returns, points=points)


def plane(representation: Tensor, env: PointRobot, count: int = 300) -> list[list[float]]:
    """[x, y, rotation in degrees] of the first contexts, on their two principal axes."""
    centered = representation - representation.mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False).Vh[:2]
    # The sign of an axis is free; fixed so that a picture does not depend on the library.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    xy = (centered @ axes.T)[:count].cpu()
    degrees = torch.rad2deg(env.angles).repeat(2)[:count].cpu().round()
    return [
        [round(x, 3), round(y, 3), d]
        for (x, y), d in zip(xy.tolist(), degrees.tolist(), strict=True)
    ]


def trained(arm: Arm, tasks: Tasks, scale: Scale, seed: int, device: str, run: Run) -> Result:
    """Trains one arm, keeps the weights of the lowest validation loss, and measures those.

    A run with a checkpoint can be cut at any time and started again: it goes on from the last look
    at the validation tasks.
    """
    torch.manual_seed(seed)
    scale = dataclasses.replace(scale, model=dataclasses.replace(scale.model, routing=arm.routing))
    model = Ablation(scale.config(arm.moe)).to(device)
    batch = contexts(scale, tasks.valid)
    folder = run.checkpoint.with_suffix(".t2mir") if run.checkpoint else None
    best_path = folder / "best.pt" if folder else None
    best: dict[str, Any] = {"loss": math.inf, "valid": {}, "model": {}}
    if best_path is not None and best_path.is_file():
        best = read_state(best_path, device)
    run.load()

    def watch(step: int) -> None:
        # `fit` saves after this, so that a run that stops here does these steps again.
        run.step(step, scale.steps, dict)
        loss = look(model, batch).loss
        best["valid"][str(step)] = loss
        if loss < best["loss"]:
            best["loss"] = loss
            best["model"] = {k: t.detach().clone() for k, t in model.state_dict().items()}
        if best_path is not None:
            best_path.parent.mkdir(parents=True, exist_ok=True)
            write_state(best_path, best)

    fit(
        model,
        tasks.train,
        steps=scale.steps,
        batch_size=scale.batch,
        episodes=scale.context,
        lr=scale.rate,
        weight_decay=scale.weight_decay,
        warm_up=scale.warm_up,
        balance_weight=scale.balance,
        contrastive_weight=arm.weight,
        seed=seed,
        progress=False,
        watch=watch,
        every=scale.every,
        checkpoint=folder / "fit.pt" if folder else None,
    )
    model.load_state_dict(best["model"])
    result = measure(model, tasks, scale, seed)
    result.valid = best["valid"]
    if folder is not None:
        shutil.rmtree(folder)
    return result


def active_parameters(model: T2MIR) -> tuple[int, int]:
    """Those a token passes through, and all but what the contrastive loss alone uses."""
    total = sum(p.numel() for n, p in model.named_parameters() if "contrast" not in n)
    idle = 0
    for module, top_k in _banks(model):
        size = sum(p.numel() for p in module.parameters())
        idle += size * (module.num_experts - top_k) // module.num_experts
    return total - idle, total


def _banks(model: T2MIR) -> list[tuple[Experts, int]]:
    config = model.config
    banks = (
        (getattr(model.experts, "token_experts", None), config.token_top_k),
        (getattr(model.experts, "task_experts", None), config.task_top_k),
    )
    return [(bank, top_k) for bank, top_k in banks if bank is not None]


def flops_a_token(model: T2MIR) -> int:
    """Returns the operations a token of a forward pass of the layers: two for each active weight of
    their products, and four for each feature and each of the (L + 1) / 2 keys that a query sees on
    average."""
    skipped = ("contrast", "embed", "head", "noise", "b_gate_up", "b_down")
    weights = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() > 1 and not any(part in n for part in skipped)
    )
    for module, top_k in _banks(model):
        size = module.w_gate_up.numel() + module.w_down.numel()
        weights -= size * (module.num_experts - top_k) // module.num_experts
    config = model.config
    length = 3 * config.max_steps + (config.variant == "dpt")
    return 2 * weights + round(config.num_layers * 4 * config.hidden_size * (length + 1) / 2)
