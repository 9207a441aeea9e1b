"""BAM: attention experts from dense models against averaged attention (BTX), at equal data."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from moe_ops import surgery
from moe_ops.zoo.bam import BAM, BAMConfig

from ..compare import bars_against
from ..picture import Picture
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from ..text import Domain, heldout_batches, load_domains
from ..training import Recipe, flops_a_token, train

SPECIALISTS = ("code", "scripture", "maths")
GENERAL = "reference"
DENSE = BAMConfig(
    hidden_size=128,
    num_layers=4,
    num_experts=1,
    num_heads=4,
    num_kv_heads=4,
    head_size=32,
    intermediate_size=512,
)
SEED = Recipe(steps=3000, batch=16, rate=3e-3, warmup=60)
SPECIALIST = Recipe(steps=2000, batch=20, rate=1.5e-3)
MIX = Recipe(steps=1000, batch=16, rate=1.5e-3)
# One in ten of a specialist's sequences is of the other text.
OWN_SHARE = 9
ARMS: dict[str, dict[str, Any]] = {
    "BAM, own K/V": {},
    "BAM, shared K/V": {"attention": "shared_kv"},
    "BAM, top-2": {"attention_top_k": 2},
    "BAM, top-1": {"attention_top_k": 1},
    "BTX": {"attention": "dense"},
}
LONGER, CONTINUED, ALL = "BTX, compute of BAM", "dense, continued", "all arms of a seed"


def whole(dense: BAMConfig, seed_recipe: Recipe, specialist: Recipe, mix: Recipe) -> Job:
    """Runs the dense models of a seed, and all arms that start from them."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        domains = {d.name: d for d in load_domains((*SPECIALISTS, GENERAL))}
        every = list(domains.values())
        first: BAM = train(  # type: ignore[assignment]
            lambda: BAM(dense), every, seed_recipe, seed, run=run.part("seed")
        ).model
        models = [first]
        for name in SPECIALISTS:
            text = [domains[name]] * OWN_SHARE + [domains[GENERAL]]
            continued = train(
                lambda: copy.deepcopy(first).train(), text, specialist, seed, run=run.part(name)
            )
            models.append(continued.model)  # type: ignore[arg-type]
        rows = {}
        for arm, options in ARMS.items():
            rows[arm] = mixed(models, options, every, mix, seed, run.part(_file(arm)))
        longer = dataclasses.replace(mix, steps=round(mix.steps * compute_ratio(models, mix)))
        rows[LONGER] = mixed(models, ARMS["BTX"], every, longer, seed, run.part(_file(LONGER)))
        dense_again = train(
            lambda: copy.deepcopy(first).train(), every, mix, seed, run=run.part(_file(CONTINUED))
        )
        rows[CONTINUED] = {"loss": dense_again.loss, "loss at the start": _loss(first, every, mix)}
        return {"rows": rows, "steps of BTX": longer.steps}

    return perform


def mixed(
    models: list[BAM],
    options: dict[str, Any],
    domains: list[Domain],
    recipe: Recipe,
    seed: int,
    run: Run,
) -> dict[str, float]:
    """Measures an arm after training on the mixture, and at its start."""
    before: dict[str, float] = {}

    def make() -> BAM:
        model = BAM.from_dense(models, **options)
        before["loss"] = _loss(model, domains, recipe)
        return model

    trained = train(make, domains, recipe, seed, run=run)
    return {"loss": trained.loss, "loss at the start": before["loss"]}


def compute_ratio(models: list[BAM], recipe: Recipe) -> float:
    """Returns BAM's FLOPs per token over those of BTX."""
    ours, btx = (BAM.from_dense(models, **ARMS[arm]) for arm in ("BAM, own K/V", "BTX"))
    features = ours.config.num_heads * ours.config.head_size * ours.config.num_layers
    experts = ours.config.num_experts
    return flops_a_token(ours, recipe.length, features * experts) / flops_a_token(
        btx, recipe.length, features
    )


def _loss(model: BAM, domains: list[Domain], recipe: Recipe) -> float:
    """Returns the held-out cross-entropy, mean over domains."""
    model.eval()
    losses = [
        surgery.super_experts.mean_loss(
            model, heldout_batches(d, recipe.heldout_batches, recipe.batch, recipe.length)
        )
        for d in domains
    ]
    model.train()
    return sum(losses) / len(losses)


def _file(arm: str) -> str:
    return arm.lower().replace(", ", "-").replace("/", "").replace(" ", "-")


def study(
    name: str, size: str, rank: int, minutes: float, dense: BAMConfig, *recipes: Recipe
) -> Study:
    def against(arm: str, other: str) -> Any:
        return lambda r: r.gap(arm, other, "loss")

    own = "BAM, own K/V"
    hypotheses = [
        Hypothesis(
            "attention experts with their own keys and values have lower loss than averaged "
            "attention (BTX) at equal data", against(own, "BTX"), "nats a byte", key="btx",
        ),
        Hypothesis(
            "and at equal compute", against(own, LONGER), "nats a byte", key="compute",
        ),
        Hypothesis(
            "with shared ones too, at equal data", against("BAM, shared K/V", "BTX"),
            "nats a byte", key="shared",
        ),
        Hypothesis(
            "soft routing of attention experts has lower loss than the best two",
            against(own, "BAM, top-2"), "nats a byte", key="soft",
        ),
        Hypothesis(
            "and the best two than the best one", against("BAM, top-2", "BAM, top-1"),
            "nats a byte", key="two",
        ),
        Hypothesis(
            "the mixture has lower loss than the seed continued on the same text",
            against(own, CONTINUED), "nats a byte",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        seed_recipe, specialist, mix = recipes
        return {
            "Model": (
                f"H {dense.hidden_size}, {dense.num_layers} parallel layers, networks of "
                f"{dense.intermediate_size}, {dense.num_heads} heads; four experts, one a token"
            ),
            "Data": f"bytes of {', '.join((*SPECIALISTS, GENERAL))}, last tenth of each held out",
            "Seed": f"all of it, {seed_recipe}",
            "Specialists": f"{', '.join(SPECIALISTS)}, a tenth of {GENERAL}, {specialist}",
            "Mixture": f"all of it in equal shares, {mix}",
        }

    runs = {ALL: whole(dense, *recipes)}
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made, pictures)


def pictures(results: Results) -> list[Picture]:
    arms = [*(arm for arm in ARMS if arm != "BTX"), LONGER, CONTINUED]
    shown = bars_against(results, arms, "BTX", {"": "loss"})
    title = "Held-out loss after the mixture, against BTX at equal data"
    return [Picture("loss", title, "", "nats a byte", "bars", shown)]


EXPERIMENT = Experiment(
    "bam",
    (study("bam-tiny", "H 128", 44, 30.0, DENSE, SEED, SPECIALIST, MIX),),
    (
        Headline(
            "btx", "lower loss than BTX at equal data", "perplexity 9.70 against 10.72", "quality",
            shown="likely: attention has four times the parameters, each set of one specialist",
        ),
        Headline(
            "compute", "and at equal compute", "perplexity 10.00 against 10.72", "quality",
            shown="1.86 times the steps bring BTX two thirds of the way",
        ),
        Headline(
            "shared", "with shared keys and values too", "perplexity 10.32 against 10.72",
            "quality",
        ),
        Headline(
            "soft", "soft routing of attention is better than the best two",
            "perplexity 10.47 against 10.72", "mechanism",
            not_shown="likely: with four experts the best two do nearly all that four do",
        ),
        Headline(
            "two", "and the best two than one", "perplexity 10.72 against 10.81", "mechanism",
            shown="one alone starts lowest and learns least",
        ),
    ),
)  # fmt: skip
