"""UNCURL: experts of a task merged, aligned or not, against experts dropped; short tuning."""

from __future__ import annotations

import copy
import dataclasses
from statistics import fmean
from typing import Any

from torch import Tensor

from moe_ops import surgery
from moe_ops.zoo.deepseek import DeepSeek

from . import subject
from .compare import Series, series
from .on_subject import Loaded, described, load
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from .training import train

TASKS = ("code", "spanish", "maths", "brown")
SIZES = (8, 4)
MERGES = ("aligned", "unaligned", "hc_smoe")
DROPS = ("frequency", "gate_norm", "reap")
STEPS, RATE, TUNED = 60, 1e-3, 480
SEED = "all arms of a seed"


def column(count: int, tuned: bool) -> str:
    return f"added, {count} left" + (", tuned" if tuned else "")


def smaller(
    model: DeepSeek, found: surgery.ExpertProfile, arm: str, count: int, seed: int
) -> DeepSeek:
    """A copy of the model with so many experts per layer."""
    result = copy.deepcopy(model)
    if arm in DROPS:
        keep = surgery.select_experts(result, surgery.score_experts(found, arm), count)
        surgery.prune_experts(result, keep)
        return result
    if arm == "hc_smoe":
        groups = surgery.hc_smoe_groups(found, count)
    else:
        groups = surgery.uncurl_groups(found, count, seed=seed)
    order = None if arm == "unaligned" else surgery.align_neurons(result, groups)
    load = {name: layer.load for name, layer in found.layers.items()}
    surgery.merge_experts(result, groups, weights=load, neuron_order=order)
    return result


def whole(name: str) -> Job:
    """All arms of a seed: each task has its own profile and its own smaller models."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        tasks = [task for task in TASKS if task in there.domains]
        before = there.losses()
        added: dict[str, dict[str, dict[str, float]]] = {}
        for task in tasks:
            found = surgery.profile_experts(
                there.model, there.profiled(task, seed), all_outputs=True
            )
            text = there.profiled(task, seed + 1, TUNED)
            for arm in (*MERGES, *DROPS):
                for count in SIZES:
                    model = smaller(there.model, found, arm, count, seed)
                    costs = tuned(there, model, task, text, before[task])
                    for after, cost in zip((False, True), costs, strict=True):
                        place = added.setdefault(arm, {}).setdefault(column(count, after), {})
                        place[task] = cost
        rows = {
            arm: {name: fmean(of.values()) for name, of in columns.items()}
            for arm, columns in added.items()
        }
        return {"rows": rows, "before": before, "added": added}

    return perform


def tuned(
    there: Loaded, model: DeepSeek, task: str, text: list[Tensor], before: float
) -> tuple[float, float]:
    """Loss added on the task, before and after tuning to it."""
    at_once = surgery.super_experts.mean_loss(model, there.judged(task)) - before
    surgery.tune(model, text, STEPS, rate=RATE)
    return at_once, surgery.super_experts.mean_loss(model, there.judged(task)) - before


def scratch(name: str, count: int) -> Job:
    """The paper's other half: a model of the reduced size that was trained from the start on the
    same text, against reduced ones of all domains together, tuned as long."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        made = subject.SUBJECTS[name]
        config = dataclasses.replace(made.config, num_experts=count)
        domains = list(there.domains.values())
        trained = train(
            lambda: DeepSeek(config), domains, made.recipe, seed, run=run.part("scratch")
        )
        first, *others = (
            surgery.profile_experts(there.model, there.profiled(domain, seed))
            for domain in there.domains
        )
        for other in others:
            first.add(other)
        text = [t for pair in zip(
            *(there.profiled(domain, seed + 1, TUNED) for domain in there.domains), strict=True
        ) for t in pair]  # fmt: skip
        rows = {"from scratch": {"loss": fmean(_losses(there, trained.model).values())}}
        for arm in ("aligned", "gate_norm"):
            model = smaller(there.model, first, arm, count, seed)
            surgery.tune(model, text, 10 * STEPS, rate=RATE)
            rows[arm] = {"loss": fmean(_losses(there, model).values())}
        return {"rows": rows}

    return perform


def _losses(there: Loaded, model: DeepSeek) -> dict[str, float]:
    model.eval()
    return {d: surgery.super_experts.mean_loss(model, there.judged(d)) for d in there.domains}


# A pilot of one model, trained on 8 MB: means over four tasks, and their standard errors, which
# stand for the spread over seeds. That is not known from one model.
PILOT = "a pilot of one model, whose spread is that over tasks"


def study(name: str, size: str, rank: int, minutes: float, model: str) -> Study:
    after = column(8, True)

    def against(arm: str, other: str, at: str = after) -> Any:
        return lambda r: r.gap(arm, other, at)

    hypotheses = [
        Hypothesis(
            "aligning neurons before merging 16 experts to 8 pays",
            against("aligned", "unaligned"), "nats a byte", key="aligned",
            expected=-0.059, deviation=0.019, pilot=PILOT,
        ),
        Hypothesis(
            "before tuning too", against("aligned", "unaligned", column(8, False)), "nats a byte",
            expected=-0.69, deviation=0.12, pilot=PILOT,
        ),
        Hypothesis(
            "merging beats dropping by frequency",
            against("aligned", "frequency"), "nats a byte", key="frequency",
            expected=0.008, deviation=0.028, pilot=PILOT,
        ),
        Hypothesis(
            "merging beats dropping by weight x norm",
            against("aligned", "gate_norm"), "nats a byte", key="norm",
            expected=0.058, deviation=0.025, pilot=PILOT,
        ),
        Hypothesis(
            "groups by router logits beat groups by outputs",
            against("aligned", "hc_smoe"), "nats a byte", key="outputs",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            **described(model),
            "Tasks": f"{', '.join(TASKS)}, each with its own smaller models",
            "Tuning": f"{STEPS} steps of 8 x 128 bytes of the task, AdamW, rate {RATE:g}",
        }

    return Study(name, size, rank, {SEED: whole(model)}, 5, minutes, hypotheses, made, pictures)


def scratch_study(name: str, size: str, rank: int, minutes: float, model: str, count: int) -> Study:
    hypotheses = [
        Hypothesis(
            "a model reduced by merging is ahead of one of its size from scratch",
            lambda r: r.gap("aligned", "from scratch", "loss"), "nats a byte", key="scratch",
        ),
        Hypothesis(
            "so is one reduced by dropping",
            lambda r: r.gap("gate_norm", "from scratch", "loss"), "nats a byte",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            **described(model),
            "Reduced": f"to {count} experts a layer for all domains, {10 * STEPS} steps of tuning",
        }

    return Study(name, size, rank, {SEED: scratch(model, count)}, 5, minutes, hypotheses, made)


def pictures(results: Results) -> list[Picture]:
    bars: Series = {}
    for tuned_ in (False, True):
        for count in SIZES:
            name = column(count, tuned_)
            arms = (*MERGES, *DROPS)
            rows = zip(*(results.of(arm, name) for arm in arms), strict=True)
            bars[name.removeprefix("added, ")] = series(list(arms), [list(row) for row in rows])
    title = "Held-out loss added by 16 experts becoming 8 or 4, mean over tasks"
    return [Picture("added", title, "", "nats a byte", "bars", bars)]


EXPERIMENT = Experiment(
    "uncurl",
    (
        study("uncurl-subject", "16 to 8 and 4", 42, 12.0, "subject"),
        scratch_study("uncurl-scratch", "8 from scratch", 55, 60.0, "subject", 8),
    ),
    (
        Headline(
            "aligned", "alignment before merging pays", "used, not ablated", "mechanism",
            shown="neurons in another order are other neurons: their averages lose both",
        ),
        Headline(
            "frequency", "merging beats dropping by frequency", "frequency pruning hurts",
            "quality", not_shown="level, before tuning dropping is ahead",
        ),
        Headline(
            "norm", "and by weight x norm", "not compared", "quality",
            contradicted="likely: an average blurs the few experts that do most of a task's work",
        ),
        Headline(
            "outputs", "router logits group better than outputs", "not compared", "mechanism",
            shown="likely: what is chosen together can stand for one another",
        ),
        Headline(
            "scratch", "a reduced model is ahead of one of its size from scratch",
            "at factors of two, sometimes four", "quality",
            contradicted="16 experts are hardly better than 8 here: there is nothing to inherit",
        ),
    ),
)  # fmt: skip
