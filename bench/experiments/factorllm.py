"""FactorLLM: a dense model's networks cut in four, routers trained in several ways, or not."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_ops import surgery, upcycle
from moe_ops.zoo.factorllm import FactorLLM
from moe_ops.zoo.llama import Llama, LlamaConfig
from moe_ops.zoo.lm.model import CausalLM

from . import subject
from .compare import bars
from .on_subject import Loaded, load
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study

SLICES = 4
TOP_KS = (1, 2)
STEPS, RATE, TUNED = 300, 5e-4, 480
PRIOR = "prior-approximate"
ARMS: dict[str, dict[str, Any]] = {
    PRIOR: {},
    "prior-approximate, clusters": {"clusters": True},
    "straight-through": {"router_training": "straight_through"},
    "as released": {"router_training": "released"},
    "random slices": {"router_training": "released", "random": True},
}
DENSE, ALL = "dense", "all arms of a seed"


def dense_of(there: Loaded) -> Llama:
    """The subject as a model whose networks can be cut; it has the same tensors."""
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
    """Share of held-out bytes that are the likeliest, the mean over domains."""
    shares = []
    for name in there.domains:
        hits = [
            (model(b[:, :-1]).argmax(-1) == b[:, 1:]).double().mean().item()
            for b in there.judged(name)
        ]
        shares.append(fmean(hits))
    return fmean(shares)


def loss_of(model: CausalLM, there: Loaded) -> float:
    return fmean(surgery.mean_loss(model, there.judged(name)) for name in there.domains)


def tuned(
    dense: Llama, there: Loaded, text: list[Tensor], top_k: int, arm: dict[str, Any], seed: int
) -> dict[str, float]:
    options = dict(arm)
    random, orders = options.pop("random", False), None
    if options.pop("clusters", False):
        banks = [upcycle.dense_bank(block.mlp) for block in dense.layers]
        orders = [upcycle.k_means_order(bank, SLICES, seed=seed) for bank in banks]
    torch.manual_seed(seed)
    model = FactorLLM.from_dense(dense, num_slices=SLICES, top_k=top_k, orders=orders, **options)

    def loss(student: Any, batch: Tensor) -> Tensor:
        if student.config.router_training != "prior":
            return student.loss(batch).loss
        return student.distill(batch, dense).loss

    def judge() -> dict[str, float]:
        return {"accuracy": accuracy(model, there), "loss": loss_of(model, there)}

    if not random:
        surgery.tune(model, text, STEPS, rate=RATE, loss=loss)
        model.eval()
        return judge()
    with surgery.route_as(model, surgery.random(top_k)):
        surgery.tune(model, text, STEPS, rate=RATE, loss=loss)
        model.eval()
        return judge()


def column(name: str, top_k: int) -> str:
    return f"{name}, {top_k} of {SLICES}"


def whole(name: str) -> Job:
    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        dense = dense_of(there)
        text = [t for group in zip(
            *(there.profiled(domain, seed + 1, TUNED) for domain in there.domains), strict=True
        ) for t in group]  # fmt: skip
        full = {"accuracy": accuracy(dense, there), "loss": loss_of(dense, there)}
        rows = {DENSE: {column(n, k): value for k in TOP_KS for n, value in full.items()}}
        for row in rows.values():
            row.update({column("accuracy kept", k): 1.0 for k in TOP_KS})
        for arm, options in ARMS.items():
            row = rows.setdefault(arm, {})
            for k in TOP_KS:
                got = tuned(dense, there, text, k, options, seed)
                row.update({column(n, k): value for n, value in got.items()})
                row[column("accuracy kept", k)] = got["accuracy"] / full["accuracy"]
        return {"rows": rows}

    return perform


def study(name: str, size: str, rank: int, minutes: float, model: str) -> Study:
    one = column("loss", 1)

    def against(other: str, at: str = one) -> Any:
        return lambda r: r.gap(PRIOR, other, at)

    hypotheses = [
        Hypothesis(
            "one slice of four keeps 85 % of the accuracy",
            lambda r: r.of(PRIOR, column("accuracy kept", 1)), "of the dense model's",
            bound=0.85, below=False, key="kept",
        ),
        Hypothesis(
            "two of four keep 95 %",
            lambda r: r.of(PRIOR, column("accuracy kept", 2)), "of the dense model's",
            bound=0.95, below=False,
        ),
        Hypothesis(
            "a prior-approximate router has lower loss than one without a gradient",
            against("as released"), "nats a byte", key="released",
        ),
        Hypothesis(
            "and than random slices", against("random slices"), "nats a byte", key="random",
        ),
        Hypothesis(
            "and than one trained by the language model's loss",
            against("straight-through"), "nats a byte", key="straight",
        ),
        Hypothesis(
            "clusters of neurons are better slices than contiguous ones",
            lambda r: r.gap("prior-approximate, clusters", PRIOR, one), "nats a byte",
            key="clusters",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        of = subject.SUBJECTS[model]
        return {
            "Model": (
                f"`bench.experiments.subject` {model}: H {of.config.hidden_size}, "
                f"{of.config.num_layers} layers, networks of {of.config.dense_intermediate_size} "
                f"in {SLICES} slices; a model a seed"
            ),
            "Data": f"bytes of {', '.join(of.domains)}, equal shares",
            "Training": str(of.recipe),
            "Tuning": f"{STEPS} steps of 8 x {of.recipe.length} bytes, AdamW, rate {RATE:g}",
        }

    return Study(name, size, rank, {ALL: whole(model)}, 5, minutes, hypotheses, made, pictures)


def pictures(results: Results) -> list[Picture]:
    columns = {f"{k} of {SLICES} slices": column("accuracy kept", k) for k in TOP_KS}
    title = "Share of the dense model's accuracy that is kept"
    return [Picture("accuracy", title, "", "share", "bars", bars(results, list(ARMS), columns))]


EXPERIMENT = Experiment(
    "factorllm",
    (study("factorllm-subject", "1 and 2 of 4", 43, 20.0, "dense"),),
    (
        Headline(
            "kept", "one slice of four keeps 85 % of the accuracy", "85 % of the quality", "quality"
        ),
        Headline(
            "released", "the prior-approximate router is better than one without a gradient",
            "not compared", "mechanism",
        ),
        Headline("random", "and than random slices", "not compared", "mechanism"),
        Headline("straight", "and than one of the loss alone", "not compared", "mechanism"),
        Headline("clusters", "clusters of neurons are better slices", "not compared", "quality"),
    ),
)  # fmt: skip
