"""T2MIR on PointRobot with hidden rotations: does its router know the task, and does that help?

Goals on a circle and actions turned by one of four hidden angles; training, validation and test
tasks are apart, drawn anew by seed. Beside a dense transformer of as many active parameters: the
experts without the contrastive loss and with two weights of it. The router is read by its nearest
neighbors among contexts of validation tasks, and so are routers that were never trained, on the
same features: what those tell is no merit of the router. `bench.studies.t2mir.long` is the same at
the authors' size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from bench.studies.picture import Picture
from bench.studies.report import means
from bench.studies.study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from bench.studies.t2mir.ablations import Ablation
from bench.studies.t2mir.arms import (
    ACTION_LOSS,
    ARMS,
    COLUMNS,
    FRESH_ROUTERS,
    GOAL,
    GOAL_FRESH,
    NEIGHBORS,
    RETURN,
    ROTATION,
    ROTATION_FEATURES,
    ROTATION_FRESH,
    ROUTED_ARMS,
    SMALL,
    UNTRAINED,
    Arm,
    Scale,
    active_parameters,
    draw,
    flops_a_token,
    measure,
    trained,
)

# The same for all arms of a seed.
drawn = functools.lru_cache(maxsize=1)(draw)


def one(name: str, arm: Arm | None, scale: Scale, device: str) -> Job:
    """A run: one arm; None: experts that were never trained."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        tasks = drawn(scale, seed, device)
        if arm is None:
            torch.manual_seed(seed)
            result = measure(Ablation(scale.config("both")).to(device), tasks, scale, seed)
        else:
            result = trained(arm, tasks, scale, seed, device, run)
        row = dict(zip(COLUMNS, result.row, strict=True))
        kept = {"returns": result.returns, "valid": result.valid, "points": result.points}
        return {"rows": {name: row}, **kept}

    return perform


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    scale: Scale,
    *,
    arms: Mapping[str, Arm] = ARMS,
    seeds: int = 5,
    device: str = "cpu",
    pilots: Mapping[str, tuple[float, float, str]] | None = None,
) -> Study:
    """All arms at one scale; pilots by the key of the hypothesis."""
    runs = {UNTRAINED: one(UNTRAINED, None, scale, device)}
    runs.update({arm: one(arm, made, scale, device) for arm, made in arms.items()})
    return Study(
        name,
        size,
        rank,
        runs,
        seeds,
        minutes,
        hypotheses(arms, pilots or {}),
        functools.partial(setting, scale),
        functools.partial(pictures, arms=arms),
    )


def setting(scale: Scale) -> dict[str, Any]:
    config = scale.config("both")
    dense, experts = (Ablation(scale.config(moe)) for moe in ("none", "both"))
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
        f"90) by the {NEIGHBORS} nearest contexts of validation tasks, in the space of the "
        f"router's mean logits, of {FRESH_ROUTERS} untrained routers on the same features (mean), "
        "and of the features themselves",
    }
    return {**found, "Tried before": scale.note} if scale.note else found


def hypotheses(
    arms: Mapping[str, Arm], pilots: Mapping[str, tuple[float, float, str]]
) -> list[Hypothesis]:
    found = []

    def add(
        statement: str,
        pair: tuple[str, str],
        columns: tuple[str, str],
        unit: str,
        below: bool,
        key: str = "",
    ) -> None:
        def of(r: Results) -> list[float]:
            return r.gap(*pair, *columns)

        mean, deviation, said = pilots.get(key, (None, None, ""))
        found.append(Hypothesis(statement, of, unit, 0.0, below, key, mean, deviation, said))

    def better(what: str, arm: str, other: str, loss_key: str = "", return_key: str = "") -> None:
        columns = (ACTION_LOSS, ACTION_LOSS)
        add(f"{arm}: lower action loss than {what}", (arm, other), columns, "loss", True, loss_key)
        columns = (RETURN, RETURN)
        statement = f"{arm}: higher return than {what}"
        add(statement, (arm, other), columns, "return", False, return_key)

    # Of the arms that are routed causally, as ours is, the strongest contrast decides.
    strongest = max(arm.weight for arm in arms.values())
    for name, arm in arms.items():
        if arm.moe == "none":
            continue
        head = arm.weight == strongest and arm.routing == "causal"
        statement = f"{name}: the router tells the rotation better than fresh routers"
        add(statement, (name, name), (ROTATION, ROTATION_FRESH), "share", False)
        statement = f"{name}: and the goal"
        add(statement, (name, name), (GOAL, GOAL_FRESH), "degrees", True)
        plain = next(
            n
            for n, a in arms.items()
            if a.moe != "none" and (a.weight, a.routing) == (0, arm.routing)
        )
        if name != plain:
            statement = f"{name}: the router tells the rotation better than without"
            pair, columns = (name, plain), (ROTATION, ROTATION)
            add(statement, pair, columns, "share", False, "tells" * head)
            add(f"{name}: and the goal", pair, (GOAL, GOAL), "degrees", True)
            better("without", name, plain, return_key="return" * head)
        better("dense", name, "dense", return_key="dense" * head)
    return found


def pictures(results: Results, arms: Mapping[str, Arm]) -> list[Picture]:
    found = []
    causal = {a.weight: n for n, a in arms.items() if a.moe == "both" and a.routing == "causal"}
    for weight in (min(causal), max(causal)):
        points = results.every(causal[weight], "points")[0]
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

    names = [UNTRAINED, *(name for name, arm in arms.items() if arm.moe != "none")]
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
            {label: means(names, [results.of(arm, c) for arm in names]) for label, c in kinds},
        )
    )
    lines = {}
    for arm in (UNTRAINED, *arms):
        episodes = list(zip(*results.every(arm, "returns"), strict=True))
        lines[arm] = means(range(1, len(episodes) + 1), episodes)
    found.append(Picture("return", "Return in unseen tasks", "episode", "return", "lines", lines))
    return found


SMALL_AD = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, variant="ad"),
    context=4,
    steps=1600,
    note="",
)
# InfoNCE gains from many tasks in a batch: 512, and a longer episode to tell them by.
MANY_TASKS = dataclasses.replace(
    SMALL,
    train=8000,
    horizon=12,
    step_size=0.15,
    steps=600,
    batch=1024,
    every=100,
    note="",
)


def repeated() -> Study:
    """Returns a study of what contrast does to the return, with as many seeds as five others ask
    for."""
    arms = {f"experts, contrast {weight:g}": Arm("both", weight) for weight in (0.0, 0.1)}
    pilots = {"return": (-0.698, 0.634, "seeds 10 to 14")}
    claims = [h for h in hypotheses(arms, pilots) if h.key == "return"]
    return Study(
        "t2mir-ad-12", "ad, more seeds", 15,
        {arm: one(arm, made, SMALL_AD, "cpu") for arm, made in arms.items()},
        12, 1.0, claims, functools.partial(setting, SMALL_AD), first_seed=15,
    )  # fmt: skip


EXPERIMENT = Experiment(
    "t2mir",
    (
        study(
            "t2mir-dpt", "24 tasks a batch, dpt", 34, 0.35, SMALL,
            pilots={
                "tells": (-0.029, 0.17, "seeds 0 to 2 at this size"),
                "return": (-0.025, 0.07, "seeds 0 to 2 at this size"),
                "dense": (0.043, 0.13, "seeds 0 to 2 at this size"),
            },
        ),
        study(
            "t2mir-ad", "24 tasks a batch, ad", 21, 1.2, SMALL_AD,
            pilots={
                "tells": (0.306, 0.12, "seeds 0 to 2 at this size"),
                "return": (-0.66, 0.64, "seeds 0 to 2 at this size"),
                "dense": (-1.33, 0.5, "seeds 0 to 2 at this size"),
            },
        ),
        study(
            "t2mir-many", "512 tasks a batch, dpt", 39, 4.0, MANY_TASKS, arms=ROUTED_ARMS,
        ),
        repeated(),
    ),
    (
        Headline(
            "tells", "the contrastive loss makes the router tell the task", "tasks lie apart",
            "mechanism",
            shown="it is what the loss asks for; the features before the router tell it as well",
            contradicted="features tell the task before any training; a contrast among 24 tasks "
            "adds nothing to it",
            not_shown="features tell the task before any training; a contrast among 24 tasks adds "
            "little to it",
        ),
        Headline(
            "return", "and that raises the return", "higher than without", "quality",
            contradicted="likely: one step of an episode tells the task anyway, and what the "
            "contrast keeps takes room in a narrow model",
            not_shown="one step of an episode tells the task, so that nobody needs the router to "
            "know it",
        ),
        Headline(
            "dense", "higher return than a dense transformer", "higher on all environments",
            "quality",
            contradicted="likely: training is short, and each expert sees a share of the tokens",
            not_shown="likely: training is short, and each expert sees a share of the tokens",
        ),
    ),
)  # fmt: skip
