"""T2MIR on PointRobot with hidden rotations: does its router know the task, and does that help?

    python -m bench.experiments.t2mir --seeds 3

Goals on a circle and actions turned by one of four hidden angles; training, validation and test
tasks are apart, drawn anew by seed. Beside a dense transformer of as many active parameters: the
experts without the contrastive loss and with two weights of it. The router is read by its nearest
neighbours among contexts of validation tasks, and so are routers that were never trained, on the
same features: what those tell is no merit of the router. `bench.experiments.t2mir_long` is the
same at the authors' size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.experiments import command
from bench.experiments.picture import Picture
from bench.experiments.report import Claim, Report, gaps, means
from moe_ops._files import write_text
from moe_ops.layers import Experts
from moe_ops.zoo.t2mir import T2MIR, T2MIRConfig, action_loss
from moe_ops.zoo.t2mir.envs import Histories, PointRobot, collect
from moe_ops.zoo.t2mir.routers import TaskRouter
from moe_ops.zoo.t2mir.training import (
    Batch,
    fit,
    play,
    read_state,
    sample_ad,
    sample_dpt,
    write_state,
)


@dataclass(frozen=True)
class Scale:
    """How much of everything: the same experiment runs in minutes and for days.

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

    def config(self, moe: str) -> T2MIRConfig:
        episodes = self.context if self.model.variant == "ad" else 1
        return dataclasses.replace(self.model, moe=moe, max_steps=episodes * self.horizon)


SMALL = Scale(
    T2MIRConfig(variant="dpt", hidden_size=32, num_layers=2, dropout=0.0),
    note="the rate: of the dense model at 8 steps of at most 0.2, 4000 tasks, batch 64, 1200 "
    "training steps, seed 0, action loss 0.159 at 1e-3 and 0.147 at 3e-3 on unseen tasks; "
    "nothing else was searched. Playing without a first random episode left its returns at -8.0 "
    "to -5.2, for it stands still while it knows nothing",
)

# Name of an arm -> (kind of the last layer, weight of the contrastive loss).
WEIGHTS = (0.0, 0.01, 0.1)
ARMS: dict[str, tuple[str, float]] = {
    "dense": ("none", 0.0),
    **{f"experts, contrast {w:g}": ("both", w) for w in WEIGHTS},
}
UNTRAINED = "untrained experts"
NEIGHBOURS, FRESH_ROUTERS = 10, 5
COLUMNS = (
    "action loss",
    "return",
    "rotation by router",
    "by fresh routers",
    "by features",
    "goal error by router",
    "by fresh routers",
    "by features",
)
ACTION_LOSS, RETURN, ROTATION, ROTATION_FRESH, ROTATION_FEATURES, GOAL, GOAL_FRESH = range(7)


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
    """What a model makes of contexts: action loss, features [B, L, H] that its last layer reads,
    and the task router's representation [B, E], None without one."""

    loss: float
    features: Tensor
    representation: Tensor | None


@torch.no_grad()
def look(model: T2MIR, batch: Batch) -> Seen:
    norm = model.experts.norm if model.experts is not None else model.dense[-1][0]
    features: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        output = model.eval()(*batch[:4])
    finally:
        hook.remove()
    loss = action_loss(output.actions, batch.target, model.config.num_actions)
    return Seen(loss.item(), features[0], output.representation)


def neighbours(known: Tensor, asked: Tensor) -> Tensor:
    """Numbers of the nearest of `known` [M, E] to each of `asked` [N, E], [N, NEIGHBOURS]."""
    mean, scale = known.mean(0), known.std(0).clamp(min=1e-6)
    return (
        torch.cdist((asked - mean) / scale, (known - mean) / scale)
        .topk(min(NEIGHBOURS, len(known)), largest=False)
        .indices
    )


def told(known: Tensor, asked: Tensor, known_env: PointRobot, asked_env: PointRobot) -> list[float]:
    """How well neighbours tell the task: share of right rotations, mean error of the goal in
    degrees. Rows are two contexts of each task, as of `contexts`."""
    near = neighbours(known, asked)
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
    centred = representation - representation.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    # The sign of an axis is free; fixed so that a picture does not depend on the library.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    xy = (centred @ axes.T)[:count].cpu()
    degrees = torch.rad2deg(env.angles).repeat(2)[:count].cpu().round()
    return [
        [round(x, 3), round(y, 3), d]
        for (x, y), d in zip(xy.tolist(), degrees.tolist(), strict=True)
    ]


def trained(
    arm: str,
    tasks: Tasks,
    scale: Scale,
    seed: int,
    device: str = "cpu",
    folder: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Result:
    """Trains one arm, keeps the weights of the lowest validation loss, and measures those.

    With a folder the run can be cut at any time and started again: it goes on where it was.
    """
    name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    done = folder / f"{name}.json" if folder else None
    if done is not None and done.is_file():
        return Result(**json.loads(done.read_text("utf-8")))
    moe, weight = ARMS[arm]
    torch.manual_seed(seed)
    model = T2MIR(scale.config(moe)).to(device)
    batch = contexts(scale, tasks.valid)
    best_path = folder / f"{name}.best.pt" if folder else None
    best: dict[str, Any] = {"loss": math.inf, "valid": {}, "model": {}}
    if best_path is not None and best_path.is_file():
        best = read_state(best_path, device)

    def watch(step: int) -> None:
        loss = look(model, batch).loss
        best["valid"][str(step)] = loss
        log(f"  {name}, step {step} of {scale.steps}: validation loss {loss:.4f}")
        if loss < best["loss"]:
            best["loss"] = loss
            best["model"] = {k: t.detach().clone() for k, t in model.state_dict().items()}
        if best_path is not None:
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
        contrastive_weight=weight,
        seed=seed,
        progress=folder is not None,
        watch=watch,
        every=scale.every,
        checkpoint=folder / f"{name}.pt" if folder else None,
    )
    model.load_state_dict(best["model"])
    result = measure(model, tasks, scale, seed)
    result.valid = best["valid"]
    if done is not None:
        write_text(done, json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    scale: Scale = SMALL,
    *,
    device: str = "cpu",
    folder: Path | None = None,
    name: str = "t2mir",
) -> Report:
    """Trains every arm with every seed, and measures untrained experts as the floor."""
    report = Report(name, setting(scale), COLUMNS)
    results: dict[str, list[Result]] = {}
    for seed in seeds:
        tasks = draw(scale, seed, device)
        torch.manual_seed(seed)
        floor = T2MIR(scale.config("both")).to(device)
        results.setdefault(UNTRAINED, []).append(measure(floor, tasks, scale, seed))
        for arm in ARMS:
            result = trained(arm, tasks, scale, seed, device, folder, log)
            results.setdefault(arm, []).append(result)
            log(
                f"seed {seed}, {arm}: action loss {result.row[ACTION_LOSS]:.4f}, "
                f"return {result.row[RETURN]:.3f}"
                + ("" if arm == "dense" else f", rotation {result.row[ROTATION]:.3f}")
            )
    report.arms = {arm: [r.row for r in found] for arm, found in results.items()}
    report.claims = claims(report.arms)
    report.pictures = pictures(results)
    return report


def active_parameters(model: T2MIR) -> tuple[int, int]:
    """Those a token passes through, and all but what the contrastive loss alone uses."""
    total = sum(p.numel() for n, p in model.named_parameters() if "contrast" not in n)
    idle = 0
    for module, top_k in _banks(model):
        size = sum(p.numel() for p in module.parameters())
        idle += size * (module.num_experts - top_k) // module.num_experts
    return total - idle, total


def _banks(model: T2MIR) -> list[tuple[Experts, int]]:
    if model.experts is None:
        return []
    config = model.config
    banks = (
        (model.experts.token_experts, config.token_top_k),
        (model.experts.task_experts, config.task_top_k),
    )
    return [(bank, top_k) for bank, top_k in banks if bank is not None]


def flops_a_token(model: T2MIR) -> int:
    """Of a forward pass of the layers: two for each active weight of their products, and four for
    each feature and each of the (L + 1) / 2 keys that a query sees on average."""
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


def setting(scale: Scale) -> dict[str, Any]:
    config = scale.config("both")
    dense, experts = (T2MIR(scale.config(moe)) for moe in ("none", "both"))
    sizes = [active_parameters(model) for model in (dense, experts)]
    form = {
        "ad": f"algorithm distillation, contexts of {scale.context} episodes by rising return",
        "dpt": "decision-pretrained, a query and a prompt of one episode",
    }[config.variant]
    found = {
        "Data": f"PointRobot, {scale.rotations} hidden rotations, goals on the unit circle, "
        f"{scale.horizon} steps of at most {scale.step_size:g}; {scale.train} tasks to train, "
        f"{scale.valid} to validate, {scale.test} to test; {scale.histories} episodes a task of a "
        "learner that follows the teacher ever more often",
        "Model": f"{form}; width {config.hidden_size}, {config.num_layers} layers, routing "
        f"{config.routing}; dense: {sizes[0][0]} parameters and {flops_a_token(dense)} FLOPs a "
        f"token, experts: {sizes[1][0]} active of {sizes[1][1]} and {flops_a_token(experts)}",
        "Training": f"{scale.steps} steps of {scale.batch} contexts, AdamW {scale.rate:g} (warm-up "
        f"{scale.warm_up}, cosine), weight decay {scale.weight_decay:g}, dropout "
        f"{config.dropout:g}, balance loss {scale.balance:g}; the weights of the lowest action "
        f"loss on validation tasks, looked at every {scale.every} steps",
        "Measured": "on test tasks: action loss; return of the last of "
        f"{scale.played} episodes played one after another, the first of random actions; rotation "
        f"(share right, chance {1 / scale.rotations:.3g}) and goal (mean error in degrees, chance "
        f"90) by the {NEIGHBOURS} nearest contexts of validation tasks, in the space of the "
        f"router's mean logits, of {FRESH_ROUTERS} untrained routers on the same features (mean), "
        "and of the features themselves",
    }
    return {**found, "Tried before": scale.note} if scale.note else found


def claims(arms: Mapping[str, Sequence[Sequence[float | None]]]) -> list[Claim]:
    found = []
    names = {w: f"experts, contrast {w:g}" for w in WEIGHTS}
    plain = names[0.0]
    for weight, arm in names.items():
        statement = f"contrast {weight:g}: the router tells the rotation better than fresh routers"
        found.append(
            Claim(statement, gaps(arms, arm, arm, ROTATION, ROTATION_FRESH), "share", below=False)
        )
        statement = f"contrast {weight:g}: and the goal"
        found.append(Claim(statement, gaps(arms, arm, arm, GOAL, GOAL_FRESH), "degrees"))
    for weight, arm in list(names.items())[1:]:
        statement = f"contrast {weight:g}: the router tells the rotation better than without"
        found.append(Claim(statement, gaps(arms, arm, plain, ROTATION), "share", below=False))
        statement = f"contrast {weight:g}: and the goal"
        found.append(Claim(statement, gaps(arms, arm, plain, GOAL), "degrees"))
        statement = f"contrast {weight:g}: lower action loss than without"
        found.append(Claim(statement, gaps(arms, arm, plain, ACTION_LOSS), "loss"))
        statement = f"contrast {weight:g}: higher return than without"
        found.append(Claim(statement, gaps(arms, arm, plain, RETURN), "return", below=False))
    for weight, arm in names.items():
        statement = f"contrast {weight:g}: lower action loss than dense"
        found.append(Claim(statement, gaps(arms, arm, "dense", ACTION_LOSS), "loss"))
        statement = f"contrast {weight:g}: higher return than dense"
        found.append(Claim(statement, gaps(arms, arm, "dense", RETURN), "return", below=False))
    return found


def pictures(results: Mapping[str, Sequence[Result]]) -> list[Picture]:
    found = []
    for weight in (WEIGHTS[0], WEIGHTS[-1]):
        points = results[f"experts, contrast {weight:g}"][0].points
        series: dict[str, dict[str, list[float]]] = {}
        for x, y, degrees in sorted(points, key=lambda p: p[2]):
            one = series.setdefault(f"turned {degrees:.0f}°", {"x": [], "y": []})
            one["x"].append(x)
            one["y"].append(y)
        found.append(
            Picture(
                f"router-{weight:g}".replace(".", "_"),
                f"Router's mean logits of unseen tasks, contrast {weight:g}, first seed",
                "first principal axis",
                "second",
                "points",
                series,
            )
        )

    names = [UNTRAINED, *list(ARMS)[1:]]
    short = ["untrained", *(f"contrast {w:g}" for w in WEIGHTS)]
    kinds = (
        ("router", ROTATION),
        ("fresh routers", ROTATION_FRESH),
        ("features", ROTATION_FEATURES),
    )
    found.append(
        Picture(
            "rotation",
            "Rotation of unseen tasks, told by ten neighbours",
            "",
            "share right",
            "bars",
            {
                label: means(short, [[r.row[i] or 0.0 for r in results[arm]] for arm in names])
                for label, i in kinds
            },
        )
    )
    lines = {}
    for arm, seeds in results.items():
        episodes = list(zip(*(r.returns for r in seeds), strict=True))
        lines[arm] = means(range(1, len(episodes) + 1), episodes)
    found.append(Picture("return", "Return in unseen tasks", "episode", "return", "lines", lines))
    return found


if __name__ == "__main__":
    command.main("t2mir", run)
