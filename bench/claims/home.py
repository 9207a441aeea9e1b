"""HoME beside MMoE and PLE: are experts healthy, and does it help?

    moe-ops claims home --seeds 3

On generated rows, whose structure is known, and on MovieLens 100k where recbole is installed. Each
model with ReLU experts and with normalised Swish experts (a star), so that structure is compared
within one kind of expert. Experts of MMoE and PLE are so wide that these models have as many
parameters as HoME, whose feature gates are the largest part of it where there are many features.
Epochs are chosen on validation AUC, and numbers are of the test rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from bench.claims import matching
from bench.claims.home_data import Table, generated, movielens
from bench.claims.report import Claim, Report, gaps
from moe_ops.zoo.home import HoMEConfig, MultiTask, build
from moe_ops.zoo.recommend import evaluate, fit

EPOCHS, PATIENCE, BATCH, LR = 6, 1, 1024, 2e-3
EXPERTS = {
    "MMoE": {"model": "mmoe", "num_shared": 8},
    "PLE": {"model": "ple", "num_shared": 2, "num_task": 1},
    "HoME": {"model": "home", "num_shared": 2, "num_category": 1, "num_task": 1},
}
COLUMNS = ("test AUC", "test GAUC", "AUC after epoch 1", "zeros", "scale ratio", "parameters")


def parameters(model: MultiTask) -> int:
    """Without embeddings and towers, which all models share."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(("features", "towers"))
    )


def matched(config: HoMEConfig, target: int) -> HoMEConfig:
    """The config with the hidden width of experts that comes nearest to `target` parameters."""

    def at(width: int) -> HoMEConfig:
        return dataclasses.replace(config, expert_hidden=width)

    return at(matching.width(lambda width: parameters(build(at(width))), target))


def arms(table: Table) -> dict[str, HoMEConfig]:
    base = HoMEConfig(
        cardinalities=table.cardinalities,
        num_dense=table.num_dense,
        categories=table.categories,
        expert_hidden=32,
    )
    found: dict[str, HoMEConfig] = {}
    target = parameters(build(dataclasses.replace(base, **EXPERTS["HoME"])))
    for name, experts in EXPERTS.items():
        config = matched(dataclasses.replace(base, **experts), target)
        found[name] = dataclasses.replace(config, expert_norm=False)
        found[f"{name}*"] = config
    return found


def measure(config: HoMEConfig, table: Table, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model = build(config)
    history = fit(
        model,
        table.train,
        table.valid,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=LR,
        patience=PATIENCE,
        seed=seed,
        progress=False,
    )
    scores = evaluate(model, table.test)
    trace: list = []
    with torch.no_grad():
        model.eval()(table.test.categorical, table.test.dense, trace)
    zeros = max(float(level.zero_fraction().max()) for level in trace)
    ratio = max(level.scale_ratio() for level in trace)
    first = history.valid[0].mean_auc
    return [scores.mean_auc, scores.mean_gauc, first, zeros, ratio, float(parameters(model))]


def run(seeds: Sequence[int], log: Callable[[str], None]) -> Report:
    """Trains every arm on every table with every seed."""
    report = Report(
        "home",
        {
            "Data": "generated rows (30000, four tasks in two categories), drawn anew by seed",
            "Training": f"Adam {LR:g}, batch {BATCH}, at most {EPOCHS} epochs, patience "
            f"{PATIENCE}, the epoch of the best validation AUC; batch and epochs are set by the "
            "time a run may take, nothing was searched",
            "Parameters": "experts of MMoE and PLE are widened to HoME's number of parameters",
            "Zeros and scale": "the worst expert's share of outputs that are 0, and the worst "
            "level's largest over smallest deviation of an expert's outputs, on test rows",
        },
        COLUMNS,
    )
    films = movielens()
    if films is None:
        log("recbole is not installed: MovieLens 100k is left out")
    for seed in seeds:
        for table in (generated(seed), films):
            if table is None:
                continue
            for arm, config in arms(table).items():
                row = measure(config, table, seed)
                report.arms.setdefault(f"{table.name}: {arm}", []).append(row)
                log(f"seed {seed}, {table.name}, {arm}: AUC {row[0]:.4f}, GAUC {row[1]:.4f}")
    report.claims = claims(report, ["generated"] + ["MovieLens 100k"] * (films is not None))
    return report


def claims(report: Report, tables: Sequence[str]) -> list[Claim]:
    def between(table: str, a: str, b: str, i: int) -> list[float]:
        return gaps(report.arms, f"{table}: {a}", f"{table}: {b}", i)

    found = []
    for table in tables:
        for name in EXPERTS:
            found.append(
                Claim(
                    f"{table}: normalised Swish experts of {name} have fewer zeros",
                    between(table, f"{name}*", name, 3),
                    "share",
                )
            )
            found.append(
                Claim(
                    f"{table}: and outputs of more even scale",
                    between(table, f"{name}*", name, 4),
                    "ratio",
                )
            )
            found.append(
                Claim(
                    f"{table}: and a better AUC after one epoch",
                    between(table, f"{name}*", name, 2),
                    "AUC",
                    below=False,
                )
            )
        for a, b in (("HoME", "PLE"), ("HoME*", "PLE*"), ("HoME", "MMoE"), ("HoME*", "MMoE*")):
            statement = f"{table}: {a} is ahead of {b} in test AUC"
            found.append(Claim(statement, between(table, a, b, 0), "AUC", below=False))
        statement = f"{table}: HoME* (the paper's) is ahead of MMoE in test AUC"
        found.append(Claim(statement, between(table, "HoME*", "MMoE", 0), "AUC", below=False))
    return found
