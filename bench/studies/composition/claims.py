"""Composition of Experts: whole models behind a category router, against one model and against a
router that learns the best model."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.studies.composition.training import (
    GENERALIST,
    Prompts,
    Settings,
    compose,
    dense_model,
    embed_bytes,
    losses_of,
    make_prompts,
)
from moe_ops.zoo.lm.model import CausalLM

from .. import python_texts
from ..compare import bars_against
from ..picture import Picture
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from ..text import Domain, load_domains
from ..training import Recipe, train
from .labels import propagate_labels
from .serving import ExpertPool

STRANGE = "names"  # From the zoo's own texts: prompts without a category.
ALL, LARGE = "all arms of a seed", "one larger generalist"
KNOWN, UNKNOWN = "loss, categories", "loss, others"
COMPOSED, ONE_STEP, SINGLE = "composition", "without the threshold", "best single model"
BY_PROMPT, FEW = "per-prompt labels", "per-prompt labels, as few"
AGREE, OF_CATEGORIES, OF_PROMPTS = "agreement", "labels of categories", "labels of prompts"


@dataclass(frozen=True)
class Plan:
    """Trained models: a specialist per category, a generalist of their size, and one of width
    `large`. tuned: specialists start from the generalist instead of random weights."""

    settings: Settings
    specialist: Recipe
    general: Recipe
    large: int
    tuned: bool = False


PLAN = Plan(
    Settings(
        domains=("code", "reference", "scripture", "maths", STRANGE), hidden_size=64, num_layers=2,
        prompts=300,
    ),
    Recipe(steps=500, batch=8, rate=3e-3),
    Recipe(steps=2000, batch=10, rate=3e-3),
    128,
)  # fmt: skip
# A generalist has read as much of one kind of text as a specialist of `PLAN`.
TUNED = dataclasses.replace(PLAN, specialist=Recipe(steps=1000, batch=8, rate=1.5e-3), tuned=True)


def domains_of(settings: Settings) -> list[Domain]:
    """Returns the domains of the categories, and the unknown one."""
    strange = python_texts.load([STRANGE])[STRANGE]
    found = load_domains([name for name in settings.domains if name != STRANGE])
    return [*found, Domain(STRANGE, strange.train, strange.held_out)]


def begun(settings: Settings, start: CausalLM | None) -> CausalLM:
    """Returns a model that starts from another, or a newly initialized one."""
    return dense_model(settings) if start is None else copy.deepcopy(start).train()


def models_of(plan: Plan, domains: list[Domain], seed: int, run: Run) -> dict[str, CausalLM]:
    """Returns models by name, with `LARGE` in addition to the composed ones."""
    settings = plan.settings
    wide = dataclasses.replace(settings, hidden_size=plan.large)
    numbers = {name: number for number, name in enumerate((*settings.models, LARGE))}
    found: dict[str, CausalLM] = {}
    for name in sorted(numbers, key=lambda name: name != GENERALIST):  # It comes first.
        specialist = name in settings.categories
        made = train(
            partial(
                begun,
                wide if name == LARGE else settings,
                found[GENERALIST] if specialist and plan.tuned else None,
            ),
            [d for d in domains if d.name == name] if specialist else domains,
            plan.specialist if specialist else plan.general,
            1000 * seed + numbers[name],
            run=run.part(name.replace(" ", "-")),
        )
        found[name] = made.model.eval()
    return found


@torch.no_grad()
def losses_by_half(model: CausalLM, prompts: Prompts) -> Tensor:
    """Returns [N, 2]: mean loss of the first and of the second half of each prompt's
    continuation."""
    length = prompts.tokens.shape[1] // 2
    parts = []
    for tokens in prompts.tokens.split(64):
        logits = model(tokens[:, :-1], last=length)
        parts.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, length:], reduction="none"))
    return torch.cat(parts).unflatten(1, (2, -1)).mean(-1)


def agreement(
    settings: Settings, models: dict[str, CausalLM], prompts: Prompts
) -> dict[str, dict[str, float]]:
    """Returns how often two labels of a training prompt agree: its category, propagated from two
    selections of labeled prompts, and its best model, by either half of its continuation."""
    embedded = embed_bytes(models[GENERALIST], prompts.prompt)
    centered = F.normalize(embedded - embedded.mean(0), dim=-1)
    place = torch.arange(len(prompts.domains)) % settings.prompts
    labels = []
    for start in (0, settings.prompts // 2):
        hidden = (place < start) | (place >= start + settings.labeled)
        labels.append(propagate_labels(centered, prompts.domains.masked_fill(hidden, -1)))
    halves = torch.stack([losses_by_half(models[m], prompts) for m in settings.models], dim=1)
    best = halves.argmin(1)
    return {
        OF_CATEGORIES: {AGREE: float((labels[0] == labels[1]).double().mean())},
        OF_PROMPTS: {AGREE: float((best[:, 0] == best[:, 1]).double().mean())},
    }


def whole(plan: Plan) -> Job:
    def perform(seed: int, run: Run) -> dict[str, Any]:
        settings = dataclasses.replace(plan.settings, seed=seed)
        domains = domains_of(settings)
        texts = {d.name: python_texts.Text(d.train, d.heldout) for d in domains}
        models = models_of(plan, domains, seed, run)
        sizes = dict.fromkeys(settings.models, 1)
        pool = ExpertPool(models.__getitem__, sizes, len(sizes))
        _, report = compose(settings, pool, texts, progress=False)
        rows: dict[str, dict[str, float]] = {
            way: {KNOWN: found["known"], UNKNOWN: found["strange"]}
            for way, found in report["losses"].items()
        }
        test = make_prompts(settings, texts, "test", settings.domains)
        loss, known = losses_of(models[LARGE], test), test.domains < len(settings.categories)
        rows[LARGE] = {KNOWN: float(loss[known].mean()), UNKNOWN: float(loss[~known].mean())}
        rows |= agreement(
            settings, models, make_prompts(settings, texts, "train", settings.categories)
        )
        numbers = {name: report[name] for name in ("right labels", "right categories")}
        return {"rows": rows, **numbers}

    return perform


def study(name: str, size: str, rank: int, minutes: float, plan: Plan, repeats: str = "") -> Study:
    settings = plan.settings

    def against(other: str, column: str = KNOWN) -> Any:
        return lambda r: r.gap(COMPOSED, other, column)

    def steadier(r: Results) -> list[float]:
        return r.gap(OF_CATEGORIES, OF_PROMPTS, AGREE)

    unit = "nats a byte"
    hypotheses = [
        Hypothesis(
            "two-step routing has lower loss than the best single model of the pool",
            against(SINGLE), unit, key="single",
        ),
        Hypothesis(
            "and than one generalist of twice the width", against(LARGE), unit, key="large",
        ),
        Hypothesis(
            "and than a router that learns the best model of each of all training prompts",
            against(BY_PROMPT), unit, key="prompts",
        ),
        Hypothesis(
            "and than such a router with as few labels", against(FEW), unit, key="few",
        ),
        Hypothesis(
            "prompts of no category lose less with the generalist for those that are not sure",
            against(ONE_STEP, UNKNOWN), unit, key="unsure",
        ),
        Hypothesis(
            "labels of categories agree more often with themselves than labels of the best model",
            steadier, "", below=False, key="agree",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            "Models": (
                f"dense, {settings.num_layers} layers; specialists and generalist H "
                f"{settings.hidden_size}, the larger generalist H {plan.large}"
            ),
            "Data": f"bytes of {', '.join(settings.categories)}; {STRANGE} for prompts of no "
            f"category, which generalists have seen; prompts of {settings.prompt_length} bytes, "
            f"scored on as many that follow; {settings.prompts} a category for training",
            "Specialists": "from the generalist on, " * plan.tuned + str(plan.specialist),
            "Generalists": str(plan.general),
            "Router": f"linear, on the generalist's states; labels from {settings.labeled} "
            "prompts a category; the generalist takes the tenth of the validation prompts with "
            "the least confidence",
        }

    return Study(
        name, size, rank, {ALL: whole(plan)}, 5, minutes, hypotheses, made, pictures,
        repeats=repeats,
    )  # fmt: skip


def pictures(results: Results) -> list[Picture]:
    arms = [COMPOSED, ONE_STEP, BY_PROMPT, FEW, LARGE]
    shown = bars_against(results, arms, SINGLE, {"": KNOWN})
    title = "Loss of what follows prompts of the categories, against the best single model"
    return [Picture("loss", title, "", "nats a byte", "bars", shown)]


EXPERIMENT = Experiment(
    "composition",
    (
        study("composition-bytes", "H 64", 45, 5.0, PLAN),
        study("composition-tuned", "H 64, tuned", 46, 5.0, TUNED, "composition-bytes"),
    ),
    (
        Headline(
            "single", "two-step routing is ahead of the best single model",
            "Arena-Hard 59.4 at 31 B parameters a prompt", "quality",
            shown="specialists that go on from the generalist know more of their kind than it does",
            not_shown="specialists that begin anew know no more of their kind than a generalist",
        ),
        Headline(
            "large", "and of one larger model", "stated", "quality",
            not_shown="one prompt in four goes to the specialist of another kind",
        ),
        Headline(
            "prompts", "and of a router by per-prompt labels", "stated", "quality",
            contradicted="labels by the loss say what a wrong specialist costs, categories do not",
        ),
        Headline(
            "few", "with as few labels", "not compared", "quality",
            contradicted="categories that are spread from 80 prompts are right in three of four",
        ),
        Headline("unsure", "the generalist helps where no category fits", "stated", "mechanism"),
        Headline(
            "agree", "labels of categories are less noisy", "stated", "mechanism",
            not_shown="the best of models that differ is as clear as a category",
        ),
    ),
)  # fmt: skip
