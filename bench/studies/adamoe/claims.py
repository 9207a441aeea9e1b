"""AdaMoE: a flow-matching policy made sparse, with weights coupled to the selection or not, under
weak and strong balance losses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from bench.studies.adamoe.skills import demonstrate
from bench.studies.adamoe.training import Settings, evaluate, lesson
from moe_ops.zoo.adamoe import ActionTransformer, AdaMoEConfig

from ..picture import Picture
from ..report import means
from ..study import FIRST_SEED, Experiment, Headline, Hypothesis, Job, Results, Run, Study
from ..trainer import train_steps
from ..zoo_fits import resumed

DENSE, ALL = "dense", "all arms of a seed"
SUCCESS, LOSS, CORRELATION = "success, %", "action loss", "correlation"
PUBLISHED, STRONG, STRONGEST = 0.01, 0.1, 1.0
# Balance loss weights for each kind of weighting; halved after the early steps.
WEIGHTS = {
    "coupled": (0.0, PUBLISHED, STRONG, STRONGEST),
    "additive": (0.0, PUBLISHED, STRONG, STRONGEST),
    "concat": (PUBLISHED, STRONG),
}


@dataclass(frozen=True)
class Plan:
    """Steps of pre-training and of each arm, states per step, rates, and test rollouts."""

    pretrain: int = 1200
    tune: int = 800
    early: int = 400
    batch: int = 128
    rate: float = 2e-3
    tune_rate: float = 1e-3
    episodes: int = 4096


def arm(variant: str, weight: float) -> str:
    return f"{variant}, balance {weight:g}"


def whole(plan: Plan, sizes: dict[str, Any]) -> Job:
    """Runs a dense policy, and all arms that are tuned from it."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        run.load()
        config = AdaMoEConfig(ffn="dense", **sizes)
        skills, chunk = config.num_skills, config.chunk
        fresh = torch.Generator().manual_seed(seed + 10_000)
        data = demonstrate(4096, chunk, skills, fresh)
        settings = Settings(num_skills=skills, episodes=plan.episodes, seed=seed)

        def trained(name: str, model: ActionTransformer, steps: int, rate: float) -> Any:
            taught = lesson(
                model,
                lambda g: demonstrate(plan.batch, chunk, skills, g),
                rate=rate,
                early_steps=plan.early,
                late_balance_weight=model.config.balance_weight / 2,
            )
            train_steps(
                f"fit adamoe {model.config.ffn}",
                model,
                *taught,
                steps=steps,
                seed=seed,
                **resumed(run, name, steps),
            )
            found = evaluate(model, data, settings, progress=False)
            row = {LOSS: found.pop("action loss"), SUCCESS: 100 * found.pop("success")}
            return row | {k: v for k, v in found.items() if k in (CORRELATION, "max_violation")}

        torch.manual_seed(seed)
        base = ActionTransformer(config)
        rows = {"before tuning": trained("first", base, plan.pretrain, plan.rate)}
        rows[DENSE] = trained("dense", copy.deepcopy(base), plan.tune, plan.tune_rate)
        for variant, weights in WEIGHTS.items():
            for weight in weights:
                torch.manual_seed(seed + 1)
                model = base.made_sparse(
                    variant,
                    num_experts=4,
                    top_k=1,
                    balance_weight=weight,
                )
                name = f"{variant}-{weight:g}".replace(".", "_")
                rows[arm(variant, weight)] = trained(name, model, plan.tune, plan.tune_rate)
        return {"rows": rows}

    return perform


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    plan: Plan,
    seeds: int = 5,
    first_seed: int = FIRST_SEED,
    pilots: Mapping[str, tuple[float, float, str]] = MappingProxyType({}),
    **sizes: Any,
) -> Study:
    """Returns a study of all arms.

    Args:
        name, size, rank, minutes, seeds, first_seed: see `Study`.
        plan: of the training.
        pilots: key of a hypothesis -> its mean, its deviation and what they were taken from.
        sizes: of the model.
    """

    def gap(weight: float) -> Any:
        return lambda r: r.gap(arm("additive", weight), arm("coupled", weight), SUCCESS)

    def against(other: str) -> Any:
        return lambda r: r.gap(arm("additive", PUBLISHED), other, SUCCESS)

    def growth(r: Any) -> list[float]:
        return [a - b for a, b in zip(gap(STRONGEST)(r), gap(PUBLISHED)(r), strict=True)]

    points = "points of success"
    hypotheses = [
        Hypothesis(
            "weights apart from the choice (additive) succeed more often than coupled ones at the "
            "published weight of the balance loss", gap(PUBLISHED), points, below=False,
            key="published",
        ),
        Hypothesis(
            "and at ten times that weight", gap(STRONG), points, below=False, key="strong",
        ),
        Hypothesis(
            "the gap is larger at a hundred times the weight than at the published one", growth,
            points, below=False, key="growth",
        ),
        Hypothesis(
            "additive weights succeed more often than the dense policy trained on",
            against(DENSE), points, below=False, key="dense",
        ),
        Hypothesis(
            "and than concatenated ones", against(arm("concat", PUBLISHED)), points, below=False,
            key="concat",
        ),
        Hypothesis(
            "additive weights are not those of the choice: their correlation is below 0.9",
            lambda r: r.of(arm("additive", PUBLISHED), CORRELATION), "", bound=0.9,
            key="apart",
        ),
    ]  # fmt: skip
    for i, hypothesis in enumerate(hypotheses):
        if hypothesis.key in pilots:
            mean, deviation, source = pilots[hypothesis.key]
            hypotheses[i] = dataclasses.replace(
                hypothesis, expected=mean, deviation=deviation, pilot=source
            )

    def made() -> dict[str, str]:
        config = AdaMoEConfig(ffn="dense", **sizes)
        return {
            "Model": (
                f"flow-matching transformer, H {config.hidden_size}, {config.num_layers} layers, "
                f"networks of {config.intermediate_size}; 4 experts, one a token, beside the "
                "shared one; a dense policy a seed"
            ),
            "Data": f"`SkillRobot`, {config.num_skills} skills, demonstrations drawn anew; "
            f"{plan.episodes} rollouts",
            "Training": f"{plan.pretrain} steps of {plan.batch} states, AdamW, rate {plan.rate:g}",
            "Tuning": f"{plan.tune} steps, rate {plan.tune_rate:g}, routers twice that; the "
            f"balance loss has half its weight after {plan.early} steps",
        }

    runs = {ALL: whole(plan, sizes)}
    return Study(
        name, size, rank, runs, seeds, minutes, hypotheses, made, pictures, first_seed=first_seed
    )


def pictures(results: Results) -> list[Picture]:
    weights = WEIGHTS["additive"]
    shown = {
        variant: means(
            [f"{weight:g}" for weight in weights],
            [results.gap(arm(variant, weight), DENSE, SUCCESS) for weight in weights],
        )
        for variant in ("coupled", "additive")
    }
    title = "Success against the dense policy, by the weight of the balance loss"
    return [Picture("success", title, "weight of the balance loss", "points", "bars", shown)]


EXPERIMENT = Experiment(
    "adamoe",
    (
        study("adamoe-skills", "H 64", 46, 5.0, Plan()),
        study(
            "adamoe-skills-12", "H 64, more seeds", 47, 5.0, Plan(), 12, 16,
            {
                "published": (1.26, 0.98, "seeds 10 to 14"),
                "strong": (1.2, 0.89, "seeds 10 to 14"),
            },
        ),
    ),
    (
        Headline("published", "additive weights are ahead of coupled ones",
                 "about 1 point of success", "quality"),
        Headline("strong", "and at ten times the balance loss", "not compared", "quality"),
        Headline("growth", "by more, the stronger the balance loss", "argued", "mechanism"),
        Headline("dense", "and of the dense policy", "1.8 points on LIBERO", "quality",
                 shown="with twice its compute in the feed-forward layers"),
        Headline("concat", "and of concatenated ones", "about 1 point of success", "quality"),
        Headline("apart", "weights are not those of the choice", "stated", "mechanism"),
    ),
)  # fmt: skip
