"""ModuleFormer: informative routing, pruning after concentration, learning with added experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from .compare import Series, series
from .modules import (
    FrozenRows,
    expert_frequencies,
    freeze_old,
    hold_frozen,
    insert_experts,
    prune,
)
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from .text import DOMAINS, Domain, heldout_batches, load_domains
from .training import Recipe, Trained, evaluate, mutual_information, setting, train

BASE = ModuleFormerConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    attention_size=32,
    intermediate_size=64,
    num_attention_experts=4,
    num_mlp_experts=8,
    gate_size=32,
)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
LONGER = dataclasses.replace(RECIPE, steps=2000)
BALANCE = 0.1
CONCENTRATION = 0.1
# Shares of tokens below which experts go, and the rise of the loss that is allowed.
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4)
LOSS_ALLOWED = 0.01


# Arm -> the loss that balances its experts.
BALANCED = {"mutual information": "mutual_information", "balance": "load_balancing"}


def balanced(
    base: ModuleFormerConfig, recipe: Recipe, domains: Sequence[Domain], seed: int, run: Run
) -> dict[str, tuple[Trained, dict[str, float]]]:
    """Arm of `BALANCED` -> its model, and what experts tell about the domain, by layer."""
    found = {}
    for arm, name in BALANCED.items():
        trained = train(
            lambda: ModuleFormer(base),
            domains,
            recipe,
            seed,
            coefficients={name: BALANCE},
            run=run.part(name),
        )
        found[arm] = trained, layer_information(trained.model, domains, recipe)
    return found


def told(base: ModuleFormerConfig, recipe: Recipe) -> Job:
    """The two arms that the mutual-information loss is about."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        found = balanced(base, recipe, load_domains(), seed, run)
        return {
            "rows": {
                arm: {"loss": trained.loss, "information": fmean(layers.values())}
                for arm, (trained, layers) in found.items()
            },
            "information": {arm: layers for arm, (_, layers) in found.items()},
        }

    return perform


def whole(base: ModuleFormerConfig, recipe: Recipe) -> Job:
    """All arms of a seed: what is tuned, pruned or taught begins with what another arm trained.

    The domain that is tuned to is the first; the new one is the last.
    """

    def perform(seed: int, run: Run) -> dict[str, Any]:
        domains = load_domains()
        *old, new = domains
        tuning = tuning_of(recipe)
        rows: dict[str, dict[str, float | None]] = {}
        kept: dict[str, Any] = {"information": {}, "cuts": {}, "change": {}}

        def note(arm: str, trained: Trained, **more: float) -> None:
            numbers: dict[str, float | None] = dict.fromkeys(COLUMNS)
            rows[arm] = {**numbers, "loss": trained.loss, **more}

        found = balanced(base, recipe, domains, seed, run)
        for arm, (trained, layers) in found.items():
            kept["information"][arm] = layers
            note(arm, trained, information=fmean(layers.values()))
        pretrained = found["mutual information"][0].model
        for arm, strength in (("concentrated", CONCENTRATION), ("plainly tuned", 0.0)):
            tuned = train(
                lambda: copy.deepcopy(pretrained),
                domains[:1],
                tuning,
                seed,
                coefficients={"concentration": strength},
                run=run.part(arm.replace(" ", "-")),
            )
            cuts = pruned(tuned, domains[0], tuning)
            kept["cuts"][arm] = cuts
            note(arm, tuned, pruned=allowed_share(cuts))

        first = train(
            lambda: ModuleFormer(base),
            old,
            recipe,
            seed,
            coefficients={"mutual_information": BALANCE},
            run=run.part("old"),
        )
        start = Trained(first.model, {})
        evaluate(start, [new], recipe)
        for arm in ("added experts", "all parameters"):
            model, prepare = copy.deepcopy(first.model), None
            if arm == "added experts":
                prepare = _held(freeze_old(model, insert_experts(model, attention=1, mlp=2)))
            taught = train(
                lambda model=model: model,  # type: ignore[misc]
                [new],
                tuning,
                seed,
                coefficients={"mutual_information": 0.0},
                prepare=prepare,
                run=run.part(arm.replace(" ", "-")),
            )
            again = Trained(taught.model, {})
            evaluate(again, old, recipe)
            changes = {"forgotten": again.loss - first.loss, "gained": start.loss - taught.loss}
            note(arm, taught, **changes)
        return {"rows": rows, **kept}

    return perform


def _held(frozen: dict[str, FrozenRows]) -> Callable[[Any, torch.optim.Optimizer], None]:
    def prepare(model: Any, optimizer: torch.optim.Optimizer) -> None:
        hold_frozen(frozen, optimizer)

    return prepare


def tuning_of(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, steps=max(1, recipe.steps // 2))


COLUMNS = ("loss", "information", "pruned", "forgotten", "gained")
SEED = "all arms of a seed"


def made_of(base: ModuleFormerConfig, recipe: Recipe) -> dict[str, str]:
    count = ModuleFormer(base).num_parameters()
    said = f"{count['total']:,} parameters, {count['active']:,} active; balance {BALANCE:g}"
    return {**setting(DOMAINS, recipe), "Model": said}


def informative(expected: float, deviation: float, pilot: str) -> Hypothesis:
    return Hypothesis(
        "experts tell more about the domain with the mutual-information loss",
        lambda r: r.gap("mutual information", "balance", "information"),
        "nats",
        below=False,
        key="information",
        expected=expected,
        deviation=deviation,
        pilot=pilot,
    )


def told_study(
    name: str, size: str, rank: int, minutes: float, seeds: int, first_seed: int, recipe: Recipe
) -> Study:
    """The mutual-information loss alone, with as many seeds as five others ask for."""

    def made() -> dict[str, str]:
        columns = "loss: held out, nats a byte; information of expert and domain, nats"
        return {**made_of(BASE, recipe), "Columns": columns}

    return Study(
        name, size, rank, {SEED: told(BASE, recipe)}, seeds, minutes,
        [informative(0.0048, 0.0069, "seeds 10 to 14")], made, first_seed=first_seed,
    )  # fmt: skip


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    base: ModuleFormerConfig = BASE,
    recipe: Recipe = RECIPE,
) -> Study:
    def made() -> dict[str, str]:
        found = made_of(base, recipe)
        found["Data"] += f"; tuned to {DOMAINS[0]}; new is {DOMAINS[-1]}"
        found["Training"] += f"; {tuning_of(recipe).steps} steps of tuning"
        found["Model"] += f", concentration {CONCENTRATION:g}"
        found["Columns"] = (
            "loss: held out, nats a byte; information of expert and domain, nats; pruned: share of "
            f"the experts that can go at {LOSS_ALLOWED:.0%} of loss; forgotten: loss added on the "
            "old domains; gained: loss taken off the new one"
        )
        return found

    hypotheses = [
        informative(0.0143, 0.0081, "seeds 0 to 2 of 0.6 MB"),
        Hypothesis(
            "concentration lets a larger share of experts go at 1 % of loss",
            lambda r: r.gap("concentrated", "plainly tuned", "pruned"),
            "of all",
            below=False,
            key="pruned",
            expected=0.167,
            deviation=0.042,
            pilot="seeds 0 to 2 of 0.6 MB",
        ),
        Hypothesis(
            "added experts learn the new domain",
            lambda r: r.of("added experts", "gained"),
            "nats a byte",
            below=False,
            key="added",
        ),
        Hypothesis(
            "they forget less than tuning everything",
            lambda r: r.gap("added experts", "all parameters", "forgotten"),
            "nats a byte",
            key="forgotten",
        ),
    ]
    runs = {SEED: whole(base, recipe)}
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made, pictures)


def pictures(results: Results) -> list[Picture]:
    """Information of each layer, loss against experts that went, learning against forgetting."""
    by_seed = results.every(SEED, "information")
    layers: Series = {}
    for arm in by_seed[0]:
        found = [of[arm] for of in by_seed]
        layers[arm] = series(list(found[0]), [list(f.values()) for f in found])
    points: Series = {}
    for cuts in results.every(SEED, "cuts"):
        for arm, of_arm in cuts.items():
            shares, rises = zip(*of_arm, strict=True)
            one = points.setdefault(arm, {"x": [], "y": []})
            one["x"] += shares
            one["y"] += [100 * rise for rise in rises]
    changes: Series = {}
    for arm in ("added experts", "all parameters"):
        pairs = zip(results.of(arm, "gained"), results.of(arm, "forgotten"), strict=True)
        changes[arm] = series(["new domain", "old domains"], [[-g, f] for g, f in pairs])
    rise = "rise of the held-out loss, %"
    after = "Held-out loss after learning the new domain, against before"
    return [
        Picture(
            "information", "Mutual information of expert and domain", "", "nats", "bars", layers
        ),
        Picture(
            "pruned", "Loss after pruning, of every seed and threshold",
            "share of experts that went", rise, "points", points,
        ),
        Picture("forgotten", after, "", "difference, nats a byte", "bars", changes),
    ]  # fmt: skip


@torch.no_grad()
def layer_information(
    model: ModuleFormer, domains: Sequence[Domain], recipe: Recipe
) -> dict[str, float]:
    """Routed layer -> mutual information of expert and domain, from counts."""
    counts: dict[str, list[torch.Tensor]] = {}
    for domain in domains:
        batches = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
        for layer, frequency in expert_frequencies(model, batches).items():
            counts.setdefault(layer, []).append(frequency)
    return {
        layer.removeprefix("layers."): mutual_information(torch.stack(rows))
        for layer, rows in counts.items()
    }


def pruned(trained: Trained, domain: Domain, recipe: Recipe) -> list[tuple[float, float]]:
    """For each threshold the share of experts that goes, and the rise of the domain's held-out loss
    as a share of it. Frequencies are of training text."""
    model = trained.model
    text = dataclasses.replace(domain, heldout=domain.train)
    batches = heldout_batches(text, recipe.heldout_batches, recipe.batch, recipe.length)
    frequencies = expert_frequencies(model, batches)
    total, found = sum(len(f) for f in frequencies.values()), []
    for threshold in THRESHOLDS:
        smaller = copy.deepcopy(model)
        kept = prune(smaller, frequencies, threshold)
        after = Trained(smaller, {})
        evaluate(after, [domain], recipe)
        share = 1 - sum(map(len, kept.values())) / total
        found.append((share, after.loss / trained.heldout[domain.name] - 1))
    return found


def allowed_share(cuts: Sequence[tuple[float, float]]) -> float:
    """The largest share of experts that goes at the allowed rise."""
    return max((share for share, rise in cuts if rise <= LOSS_ALLOWED), default=0.0)


EXPERIMENT = Experiment(
    "moduleformer",
    (
        study("moduleformer-500", "0.6 MB", 16, 2.5),
        study("moduleformer-2000", "2.3 MB", 51, 10.0, recipe=LONGER),
        told_study("moduleformer-2000-24", "2.3 MB, more seeds", 52, 1.1, 24, 15, LONGER),
    ),
    (
        Headline(
            "information", "the mutual-information loss makes experts tell the domain",
            "used, not ablated", "mechanism",
            shown="it asks for sure choices with all experts in use, and kinds of text are what "
            "tokens can be told apart by",
        ),
        Headline(
            "pruned", "more experts can go after concentration",
            "modules that a task does not need can be pruned", "cost",
            shown="it lowers the entropy of the experts' use, and experts that nobody uses can go",
        ),
        Headline(
            "added", "added experts learn a new domain", "new modules learn new knowledge",
            "quality",
            shown="they and their rows of the routers are trained on nothing else",
        ),
        Headline(
            "forgotten", "and forget less than full tuning",
            "more robust to forgetting than dense models", "quality",
            shown="the old experts stay as they are; what is forgotten is what new rows of the "
            "routers take from them",
        ),
    ),
)  # fmt: skip
