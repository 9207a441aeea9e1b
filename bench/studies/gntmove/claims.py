"""GNT-MOVE: view experts against dense networks, on generated scenes outside the training set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.studies.gntmove.scenes import MATERIALS, see
from bench.studies.gntmove.training import Unseen, draw_batch, draw_unseen, routing_of
from moe_ops.zoo.gntmove import GNTMove, GNTMoveConfig
from moe_ops.zoo.gntmove.cameras import rays

from ..images import psnr
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from ..training import Recipe, train_drawn

FULL, FREE, LONE = "GNT-MOVE", "without the consistency loss", "without the permanent expert"
DENSE, WIDE = "GNT", "GNT, wide"
# LONE's tokens use two networks, FULL's three.
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"ffn": "dense"},
    WIDE: {"ffn": "dense", "dense_ratio": 12},
    LONE: {"permanent": False},
    FREE: {"consistency_weight": 0.0},
    FULL: {},
}
# In dB: the allowed cost of the consistency loss.
COST = 0.1


@dataclass(frozen=True)
class Plan:
    """Training of each arm, and test pixels: `pixels` of each of `test` unseen scenes."""

    config: GNTMoveConfig
    steps: int
    scenes: int = 2
    count: int = 64
    size: int = 48
    views: int = 4
    rate: float = 2e-3
    test: int = 60
    pixels: int = 200


SMALL = Plan(GNTMoveConfig(num_layers=2), steps=1500)


@torch.no_grad()
def measure(model: GNTMove, data: Unseen, pixels: Tensor) -> dict[str, float]:
    """Returns PSNR over pixels [S, N, 2] of each scene, the mean over scenes and by material."""
    model.eval()
    truth = see(data.scenes, *rays(data.target, pixels))
    values = psnr(model(data.views, data.target, pixels).colors.clamp(0, 1), truth)
    found = {"PSNR": float(values.mean())}
    for number, name in enumerate(MATERIALS):
        found[f"PSNR, {name}"] = float(values[data.scenes.material == number].mean())
    return found


def one(arm: str, plan: Plan) -> Job:
    """Runs one model on the scenes of a seed."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        fresh = torch.Generator().manual_seed(1_000_000 + seed)
        test = draw_unseen(plan.test, fresh, views=plan.views, size=plan.size)
        pixels = torch.randint(plan.size, (plan.test, plan.pixels, 2), generator=fresh).float()
        torch.manual_seed(seed)
        model = GNTMove(dataclasses.replace(plan.config, **ARMS[arm]))
        sizes = {"scenes": plan.scenes, "views": plan.views, "count": plan.count, "size": plan.size}

        def loss(draw: torch.Generator) -> Tensor:
            return model.loss(*draw_batch(draw, **sizes), generator=draw).loss

        recipe = Recipe(steps=plan.steps, rate=plan.rate, weight_decay=0.0)
        train_drawn(model, loss, recipe, seed, run)
        told = routing_of(model, test, 32) if model.config.ffn == "moe" else {}
        row = {
            **measure(model, test, pixels),
            "neighbour divergence": told.get("neighbour divergence"),
            "neighbour agreement": told.get("neighbour agreement"),
            "entropy": told.get("entropy"),
            "effective experts": told.get("effective experts"),
            "parameters": float(sum(p.numel() for p in model.parameters())),
        }
        return {"rows": {arm: row}}

    return perform


def study(name: str, size: str, rank: int, minutes: float, plan: Plan) -> Study:
    def ahead(a: str, b: str) -> Any:
        return lambda r: r.gap(a, b, "PSNR")

    def ratio(r: Results) -> list[float]:
        pairs = zip(
            r.of(FULL, "neighbour divergence"), r.of(FREE, "neighbour divergence"), strict=True
        )
        return [a / b for a, b in pairs]

    hypotheses = [
        Hypothesis(
            "GNT-MOVE renders unseen scenes better than GNT with networks of as many parameters as "
            "a point uses", ahead(FULL, WIDE), "dB", below=False, key="wide",
        ),
        Hypothesis(
            "and than GNT", ahead(FULL, DENSE), "dB", below=False, key="dense",
        ),
        Hypothesis(
            "and than GNT-MOVE without the permanent expert", ahead(FULL, LONE), "dB",
            below=False, key="permanent",
        ),
        Hypothesis(
            "the consistency loss halves the divergence of neighbouring points", ratio,
            "of that without", bound=0.5, key="half",
        ),
        Hypothesis(
            "it makes them choose the same experts more often",
            lambda r: r.gap(FULL, FREE, "neighbour agreement"), "of the chosen", below=False,
            key="agree",
        ),
        Hypothesis(
            "and leaves more than the load of K experts in use",
            lambda r: [n - plan.config.top_k for n in r.of(FULL, "effective experts")],
            "effective experts above K", bound=0.2, below=False, key="used",
        ),
        Hypothesis(
            "it costs at most 0.1 dB", ahead(FULL, FREE), "dB", bound=-COST, below=False,
            key="cost",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        config = plan.config
        return {
            "Data": f"fresh scenes of three things on a floor, one material a scene "
            f"({', '.join(MATERIALS)}), {plan.views} source views of {plan.size} pixels; "
            f"{plan.pixels} pixels of each of {plan.test} unseen scenes a seed",
            "Model": f"H {config.hidden_size}, {config.num_layers} view and ray transformers, "
            f"{config.num_points} points a ray, E {config.num_experts}, K {config.top_k}, "
            f"networks of {config.mlp_ratio} H ({WIDE}: 12 H); weights of losses: balance "
            f"{config.balance_weight:g}, consistency {config.consistency_weight:g}",
            "Training": f"AdamW {plan.rate:g} (warm-up 50, cosine to a tenth), {plan.steps} steps "
            f"of {plan.count} rays of each of {plan.scenes} scenes",
        }

    runs = {arm: one(arm, plan) for arm in ARMS}
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made)


EXPERIMENT = Experiment(
    "gntmove",
    (study("gntmove-scenes", "H 32", 46, 1.3, SMALL),),
    (
        Headline(
            "wide", "view experts are better than a network as wide, on unseen scenes",
            "not compared", "quality",
            shown="likely: four experts hold more than one network that a point can pass",
        ),
        Headline(
            "dense", "and than GNT", "26.02 dB on LLFF, ahead of GNT", "quality",
            not_shown="ahead in all seeds, by 1.4 dB in one",
        ),
        Headline(
            "permanent", "the permanent expert pays", "called essential", "mechanism",
            not_shown="likely: scenes of a few things need little that all points share",
        ),
        Headline(
            "half", "the consistency loss halves the divergence of neighbours",
            "called essential", "mechanism",
            shown="weights are nearly equal with it and without it",
        ),
        Headline(
            "agree", "and they choose the same experts more often", "not stated", "mechanism",
            not_shown="neighbours agree in 94 % without it",
        ),
        Headline(
            "used", "without sending all points to the same experts", "not stated", "mechanism"
        ),
        Headline("cost", "it costs at most 0.1 dB", "not stated", "cost"),
    ),
)  # fmt: skip
