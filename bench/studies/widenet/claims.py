"""WideNet: norms of each depth on a shared block, against shared norms and unshared blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.studies.widenet.controls import ControlLM, ControlViT, build
from bench.studies.widenet.depths import across_depths
from bench.studies.widenet.images import warped_digits
from bench.studies.widenet.training import Settings, make_config

from ..study import Experiment, Headline, Hypothesis, Job, Run, Study
from ..text import Domain, heldout_batches, load_domains
from ..training import Recipe, Trained, job, setting, thinned, train_drawn

DOMAINS = ("reference", "code", "maths")
ARMS = {
    "WideNet": "widenet",
    "shared norms": "shared-norms",
    "ALBERT": "dense-shared-norms",
    "unshared": "unshared",
}
SIZES = Settings(hidden_size=64, num_layers=6, intermediate_size=64)
RECIPE = Recipe(steps=1000, batch=16, rate=2e-3)
SEEING = dataclasses.replace(SIZES, trunk="vision", hidden_size=48)
IMAGES = Recipe(steps=2000, batch=64, rate=2e-3)
TESTED = 100  # Batches of fresh images.


def of_depths(trained: Trained, domains: Sequence[Domain], recipe: Recipe) -> Mapping[str, Any]:
    """Measures how the choice of experts changes with depth, on held-out text."""
    parts = []
    for domain in domains:
        (rows,) = heldout_batches(domain, 1, recipe.batch, recipe.length)
        with torch.no_grad():
            routing = trained.model(rows[:, :-1], return_routing=True).routing
        if not routing:
            return {"row": {"kept": None, "divergence": None}}
        parts.append(across_depths(routing))
    return {"row": {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}}


def reading(arm: str, recipe: Recipe) -> Job:
    config = make_config(SIZES, ARMS[arm])
    columns = ("loss", "MaxVio") if config.num_experts > 1 else ("loss",)
    return job(
        arm, lambda: ControlLM(config), recipe, domains=partial(load_domains, DOMAINS),
        measure=of_depths, columns=columns,
    )  # fmt: skip


def seeing(arm: str, recipe: Recipe) -> Job:
    """Trains on images that are drawn anew in each step; error and loss on as fresh ones."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = ControlViT(make_config(SEEING, ARMS[arm]))
        size = SEEING.image_size

        def loss(draw: torch.Generator) -> torch.Tensor:
            return model.loss(*warped_digits(recipe.batch, size, draw)).loss

        curve = train_drawn(model, loss, recipe, seed, run)
        fresh = torch.Generator().manual_seed(seed + 10_000)
        wrong, losses, depths = [], [], []
        with torch.no_grad():
            for _ in range(TESTED):
                images, labels = warped_digits(recipe.batch, size, fresh)
                out = model.loss(images, labels)
                losses.append(out.cross_entropy)
                wrong.append((out.logits.argmax(-1) != labels).double().mean())
                if out.routing:
                    depths.append(across_depths(out.routing))
        row: dict[str, Any] = {
            "loss": float(torch.stack(losses).double().mean()),
            "error, %": 100 * float(torch.stack(wrong).mean()),
        }
        for name in ("kept", "divergence"):
            row[name] = sum(d[name] for d in depths) / len(depths) if depths else None
        return {"rows": {arm: row}, "curve": thinned(curve)}

    return perform


def hypotheses(unit: str, column: str, key: str, bound: float) -> list[Hypothesis]:
    """`bound`: what WideNet may lose to unshared blocks."""

    def against(other: str, of: str = column) -> Any:
        return lambda r: r.gap("WideNet", other, of)

    return [
        Hypothesis(
            "norms of each depth are better than shared ones", against("shared norms"), unit,
            key=f"norms{key}",
        ),
        Hypothesis(
            "WideNet is better than a shared dense block with shared norms", against("ALBERT"),
            unit, key=f"albert{key}",
        ),
        Hypothesis(
            f"WideNet loses less than {bound:g} to dense blocks of each depth",
            against("unshared"), unit, bound=bound, key=f"unshared{key}",
        ),
        Hypothesis(
            "with norms of each depth fewer tokens keep their best expert",
            against("shared norms", "kept"), "of the tokens", key="" if key else "depths",
        ),
    ]  # fmt: skip


def models(sizes: Settings) -> dict[str, str]:
    found = {}
    for arm, name in ARMS.items():
        config = make_config(sizes, name)
        count = build(config).num_parameters()["total"]
        found[arm] = f"{count:,} parameters"
    found["Model"] = (
        f"H {sizes.hidden_size}, {sizes.num_layers} depths, {sizes.num_experts} experts of "
        f"{sizes.intermediate_size}, {sizes.top_k} a token; dense networks of "
        f"{sizes.top_k * sizes.intermediate_size}"
    )
    return found


def text_study(name: str, size: str, rank: int, minutes: float, recipe: Recipe) -> Study:
    def made() -> dict[str, str]:
        return {**setting(DOMAINS, recipe), **models(SIZES)}

    runs = {arm: reading(arm, recipe) for arm in ARMS}
    claims = hypotheses("nats a byte", "loss", "", 0.02)
    return Study(name, size, rank, runs, 5, minutes, claims, made)


def image_study(name: str, size: str, rank: int, minutes: float, recipe: Recipe) -> Study:
    def made() -> dict[str, str]:
        return {
            "Data": f"generated digits of {SEEING.image_size} x {SEEING.image_size} pixels, warped "
            f"and noisy, new ones in each step; tested on {TESTED * recipe.batch:,} others",
            "Training": f"{recipe.steps} steps of {recipe.batch} images, AdamW, rate "
            f"{recipe.rate:g} (warm-up {recipe.warmup}, cosine to a tenth)",
            **models(SEEING),
        }

    runs = {arm: seeing(arm, recipe) for arm in ARMS}
    claims = hypotheses("nats an image", "loss", " of images", 0.02)
    return Study(name, size, rank, runs, 5, minutes, claims, made)


EXPERIMENT = Experiment(
    "widenet",
    (
        text_study("widenet-text", "2 MB of text", 37, 1.4, RECIPE),
        image_study("widenet-digits", "warped digits", 38, 1.3, IMAGES),
    ),
    (
        Headline(
            "norms", "norms of each depth are better than shared ones, on text",
            "figures not checked", "quality",
            not_shown="a router sees much the same at each depth, with norms of its own or not",
        ),
        Headline(
            "norms of images", "so too on images", "figures not checked", "quality"
        ),
        Headline(
            "albert", "better than a dense block with shared norms (ALBERT), on text",
            "1.8 points, mean of four data sets", "quality",
            shown="four experts in place of one network, at equal arithmetic",
        ),
        Headline(
            "albert of images", "so too on images", "not compared", "quality",
            shown="four experts in place of one network, at equal arithmetic",
        ),
        Headline(
            "unshared", "as good as unshared blocks on text, 0.02 nats", "0.8 points above BERT "
            "with factorized embeddings", "cost",
            contradicted="six blocks of their own have 2.8 times the parameters",
        ),
        Headline(
            "unshared of images", "as good as unshared blocks on images, 0.02 nats",
            "1.5 points above ViT with 0.72 of its parameters", "cost",
        ),
        Headline(
            "depths", "with norms of each depth the choice of experts changes more with depth",
            "figures not checked", "mechanism",
            not_shown="86 % of the tokens keep their best expert from depth to depth in both",
        ),
    ),
)  # fmt: skip
