"""FactorLLM: a dense model's networks cut in four, with routers trained in several ways, or
untrained."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.studies.factorllm.straight_through import StraightThrough
from moe_ops import surgery, upcycle
from moe_ops.zoo.factorllm import FactorLLM
from moe_ops.zoo.llama import Llama, LlamaConfig
from moe_ops.zoo.lm.model import CausalLM

from .. import subject
from ..compare import bars
from ..on_subject import BATCH, Loaded, load
from ..picture import Picture
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study

SLICES = 4
PRIOR = "prior-approximate"
ARMS: dict[str, dict[str, Any]] = {
    PRIOR: {},
    "prior-approximate, clusters": {"clusters": True},
    "straight-through": {"straight_through": True},
    "as released": {"released": True},
    "random slices": {"released": True, "random": True},
}
DENSE, ALL = "dense", "all arms of a seed"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tuning of a study's sliced models: steps of eight sequences, the maximum learning rate, the
    arms, and the numbers of slices per token."""

    steps: int
    rate: float
    arms: tuple[str, ...] = tuple(ARMS)
    top_ks: tuple[int, ...] = (1, 2)

    def text(self, there: Loaded, seed: int) -> list[Tensor]:
        """Returns batches of all steps, the domains in turn."""
        domains = there.domains
        count = BATCH * -(-self.steps // len(domains))
        drawn = [there.profiled(domain, seed + 1, count) for domain in domains]
        return [batch for group in zip(*drawn, strict=True) for batch in group]


def dense_of(there: Loaded) -> Llama:
    """Returns the subject as a model with sliceable networks and equal tensors."""
    config = there.model.config
    shared = ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_size", "norm_eps")
    dense = Llama(
        LlamaConfig(
            **{name: getattr(config, name) for name in shared},
            num_kv_heads=config.num_heads,
            rope_theta=config.rope_theta,
            intermediate_size=config.dense_intermediate_size,
        )
    )
    dense.load_state_dict(there.model.state_dict())
    return dense.eval()


@torch.no_grad()
def accuracy(model: CausalLM, there: Loaded) -> float:
    """Returns the fraction of held-out bytes that are the most likely, the mean over domains."""
    shares = []
    for name in there.domains:
        hits = [
            (model(b[:, :-1]).argmax(-1) == b[:, 1:]).double().mean().item()
            for b in there.judged(name)
        ]
        shares.append(fmean(hits))
    return fmean(shares)


def loss_of(model: CausalLM, there: Loaded) -> float:
    return fmean(
        surgery.super_experts.mean_loss(model, there.judged(name)) for name in there.domains
    )


def judged(model: CausalLM, there: Loaded) -> dict[str, float]:
    return {"accuracy": accuracy(model, there), "loss": loss_of(model, there)}


def tuned(
    dense: Llama,
    there: Loaded,
    text: list[Tensor],
    plan: Plan,
    top_k: int,
    arm: dict[str, Any],
    seed: int,
) -> dict[str, float]:
    orders = None
    if "clusters" in arm:
        banks = [upcycle.experts_from_dense(block.mlp) for block in dense.layers]
        orders = [upcycle.k_means_order(bank, SLICES, seed=seed) for bank in banks]
    torch.manual_seed(seed)
    kind = StraightThrough if "straight_through" in arm else FactorLLM
    model = kind.from_dense(dense, num_slices=SLICES, top_k=top_k, orders=orders)

    def loss(student: Any, batch: Tensor) -> Tensor:
        if "straight_through" in arm or "released" in arm:
            return student.loss(batch).loss
        return student.distill(batch, dense).loss

    routed = nullcontext()
    if "random" in arm:
        routed = surgery.override_routing(model, surgery.rules.random(top_k))
    with routed:
        surgery.tune(model, text, plan.steps, rate=plan.rate, loss=loss)
        return judged(model.eval(), there)


def column(name: str, top_k: int) -> str:
    return f"{name}, {top_k} of {SLICES}"


def job(name: str, plan: Plan, arms: tuple[str, ...]) -> Job:
    """Runs the unmodified dense model of a seed and these arms."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        dense = dense_of(there)
        text, full = plan.text(there, seed), judged(dense, there)
        rows: dict[str, dict[str, float]] = {}
        for arm in arms:
            row = rows[arm] = {}
            for k in plan.top_ks:
                got = full if arm == DENSE else tuned(dense, there, text, plan, k, ARMS[arm], seed)
                row.update({column(n, k): value for n, value in got.items()})
                row[column("accuracy kept", k)] = got["accuracy"] / full["accuracy"]
        return {"rows": rows}

    return perform


# Claim, bound, headline, by the number of slices per token.
KEPT = {
    1: ("one slice of four keeps 85 % of the accuracy", 0.85, "kept"),
    2: ("two of four keep 95 %", 0.95, ""),
}
# Claim, the arm of lower loss, the other arm, headline.
LOWER = (
    (
        "a prior-approximate router has lower loss than one without a gradient",
        PRIOR, "as released", "released",
    ),
    ("and than random slices", PRIOR, "random slices", "random"),
    (
        "and than one trained by the language model's loss", PRIOR, "straight-through", "straight",
    ),
    (
        "clusters of neurons are better slices than contiguous ones",
        "prior-approximate, clusters", PRIOR, "clusters",
    ),
)  # fmt: skip
SHORT = Plan(300, 5e-4)
# Steps and rate with the best results for seed 0, among 1000 steps at 5e-4, 1.5e-3, and 3e-3.
LONGER = Plan(1000, 1.5e-3, (PRIOR, "straight-through", "as released", "random slices"), (1,))


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    model: str,
    plan: Plan,
    *,
    apart: bool,
    repeats: str = "",
) -> Study:
    """Returns a study; `apart`: each arm is a separate run; repeats: see `Study`."""

    def kept(k: int) -> Hypothesis:
        statement, bound, key = KEPT[k]
        return Hypothesis(
            statement, lambda r: r.of(PRIOR, column("accuracy kept", k)), "of the dense model's",
            bound=bound, below=False, key=key,
        )  # fmt: skip

    def lower(statement: str, arm: str, other: str, key: str) -> Hypothesis:
        def gap(results: Results) -> list[float]:
            return results.gap(arm, other, column("loss", 1))

        return Hypothesis(statement, gap, "nats a byte", key=key)

    hypotheses = [kept(k) for k in plan.top_ks]
    hypotheses += [lower(*row) for row in LOWER if {*row[1:3]} <= {*plan.arms}]
    arms = (DENSE, *plan.arms)
    runs = (
        {arm: job(model, plan, (arm,)) for arm in arms} if apart else {ALL: job(model, plan, arms)}
    )

    def made() -> dict[str, str]:
        of = subject.SUBJECTS[model]
        return {
            "Model": (
                f"`bench.studies.subject` {model}: H {of.config.hidden_size}, "
                f"{of.config.num_layers} layers, networks of {of.config.dense_intermediate_size} "
                f"in {SLICES} slices; a model a seed"
            ),
            "Data": f"bytes of {', '.join(of.domains)}, equal shares",
            "Training": str(of.recipe),
            "Tuning": f"{plan.steps} steps of 8 x {of.recipe.length} bytes, AdamW, "
            f"rate {plan.rate:g}",
        }

    return Study(
        name, size, rank, runs, 5, minutes, hypotheses, made, pictures(plan), repeats=repeats
    )


def pictures(plan: Plan) -> Any:
    columns = {f"{k} of {SLICES} slices": column("accuracy kept", k) for k in plan.top_ks}
    name = f"accuracy-{plan.steps}-steps"
    title = f"Share of the dense model's accuracy that is kept, {plan.steps} steps of tuning"

    def drawn(results: Results) -> list[Picture]:
        return [Picture(name, title, "", "share", "bars", bars(results, plan.arms, columns))]

    return drawn


EXPERIMENT = Experiment(
    "factorllm",
    (
        study("factorllm-subject", "1 and 2 of 4", 43, 20.0, "dense", SHORT, apart=False),
        study("factorllm-longer", "1 of 4, longer", 47, 2.0, "dense", LONGER, apart=True,
            repeats="factorllm-subject",
        ),
    ),
    (
        Headline(
            "kept", "one slice of four keeps 85 % of the accuracy", "85 % of the quality",
            "quality", shown="1000 steps of tuning are enough, 300 are not",
        ),
        Headline(
            "released", "the prior-approximate router is better than one without a gradient",
            "not compared", "mechanism",
            contradicted="likely: slices learn to serve any choice that stays as it is, and that "
            "of a router in training does not",
        ),
        Headline("random", "and than random slices", "not compared", "mechanism"),
        Headline("straight", "and than one of the loss alone", "not compared", "mechanism"),
        Headline(
            "clusters", "clusters of neurons are better slices", "not compared", "quality",
            contradicted="likely: neurons of a cluster act alike, so that one cluster says less of "
            "the sum of all than one contiguous slice; of two slices clusters are the better",
        ),
    ),
)  # fmt: skip
