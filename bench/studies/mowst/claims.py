"""Mowst beside its experts alone: does each take the nodes it can do, and what does that save?

Three graphs. `two_populations` (drawn anew by seed) needs both experts: an MLP can do its feature
nodes, a GCN its structure nodes. On `misleading` a GCN is sure of the feature nodes, and wrong. On
films of MovieLens 100k linked by cast and crew neighbors tell little. Every stage keeps the epoch
of the lowest validation loss; warm-up and form of the confidence are chosen on validation accuracy;
numbers are of test nodes. Needs PyTorch Geometric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.studies.mowst.arms import (
    ACCURACY,
    ALONE,
    CANDIDATES,
    COLUMNS,
    EPOCHS,
    FEATURED,
    FLOPS,
    GRAPHS,
    LR,
    MEAN,
    MIXTURES,
    ONE_BY_ONE,
    PATIENCE,
    ROUNDS,
    SAVING,
    SIZES,
    THRESHOLDS,
    case_of,
    measure,
)
from bench.studies.picture import Picture
from bench.studies.report import means
from bench.studies.study import (
    FIRST_SEED,
    Experiment,
    Headline,
    Hypothesis,
    Job,
    Results,
    Run,
    Study,
)


def one(name: str) -> Job:
    """All arms on one graph."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        case = case_of(name, seed)
        found = measure(case, seed)
        rows = {
            f"{name}: {arm}": dict(zip(COLUMNS, row, strict=True))
            for arm, row in found.rows.items()
        }
        graph = case.graph
        said = (
            f"{len(graph.y)} nodes, {graph.edge_index.shape[1]} edges, "
            f"{int(graph.y.max()) + 1} classes"
        )
        more = {"confidence": found.confidence, "chosen": found.chosen, "graph": said}
        return {"rows": rows, **more}

    return perform


def graph_study(
    name: str,
    graph: str,
    rank: int,
    minutes: float,
    seeds: int,
    planned: Sequence[Hypothesis],
    *,
    size: str = "",
    first_seed: int = FIRST_SEED,
) -> Study:
    candidates = ", ".join(f"{form} after {warm_up}" for warm_up, form in CANDIDATES)
    hidden, dropout = SIZES[graph]

    def made() -> dict[str, str]:
        return {
            "Graph": f"{GRAPHS[graph]}; width {hidden}, dropout {dropout:g}; 40 % train, 20 % "
            "validate, 40 % test",
            "Training": f"two layers, AdamW {LR:g}, at most {EPOCHS} epochs a stage, patience "
            f"{PATIENCE}, Mowst at most {ROUNDS} rounds of turns; the best epoch by validation "
            "loss",
            "Confidence": "chosen by validation accuracy for each seed from (form after warm-up): "
            f"{candidates}",
            "Parameters": "MLP and GCN alone are as wide as inside Mowst; the wide ones, whose "
            "width is the same for both, have as many as Mowst in all, and SAGE about as many",
            "Saved": "of rows of the GCN, and of FLOPs of both experts, where all nodes are "
            f"predicted at once; one by one: where {ONE_BY_ONE} test nodes are asked for one at a "
            "time, each for the neighbourhood that its layers read. Mowst: the draw decides "
            "(accuracy is the mean over draws, accuracy when saving that of one). Mowst*: nodes of "
            "C above a threshold get the MLP alone, the lowest of "
            f"{', '.join(f'{t:g}' for t in THRESHOLDS)} that costs no validation accuracy",
        }

    def drawn(results: Results) -> list[Picture]:
        return pictures(results, graph)

    return Study(
        name, size or graph, rank, {graph: one(graph)}, seeds, minutes, planned, made, drawn,
        first_seed,
    )  # fmt: skip


def ahead(
    graph: str,
    statement: str,
    arm: str,
    others: Sequence[str],
    *,
    bound: float = 0.0,
    key: str = "",
    pilot: tuple[float, float, str] | None = None,
) -> Hypothesis:
    """The arm's accuracy is above that of the best of the others."""

    def of(r: Results) -> list[float]:
        best = zip(*(r.of(f"{graph}: {other}", ACCURACY) for other in others), strict=True)
        pairs = zip(r.of(f"{graph}: {arm}", ACCURACY), best, strict=True)
        return [a - max(b) for a, b in pairs]

    expected, deviation, said = pilot or (None, None, "")
    return Hypothesis(
        f"{graph}: {statement}", of, "accuracy", bound, False, key, expected, deviation, said
    )


def surer(graph: str, arm: str, first: str, second: str, key: str = "") -> Hypothesis:
    def of(r: Results) -> list[float]:
        return [c[arm][first] - c[arm][second] for c in r.every(graph, "confidence")]

    statement = f"{graph}: {arm} is surer of {first} than of {second}"
    return Hypothesis(statement, of, "C", below=False, key=key)


def saves(graph: str, column: str, how: str, key: str = "") -> Hypothesis:
    return Hypothesis(
        f"{graph}: Mowst* saves a quarter of the FLOPs, nodes {how}",
        lambda r: r.of(f"{graph}: Mowst*", column),
        "of all",
        bound=0.25,
        below=False,
        key=key,
    )


def costs(graph: str) -> Hypothesis:
    arm = f"{graph}: Mowst*"
    return Hypothesis(
        f"{graph}: what Mowst* saves costs less than half a point",
        lambda r: r.gap(arm, arm, ACCURACY, SAVING),
        "accuracy",
        bound=0.005,
    )


def with_sage(graph: str, pilot: tuple[float, float, str]) -> Hypothesis:
    return ahead(
        graph, "Mowst* with SAGE is ahead of MLP and SAGE", "Mowst*, SAGE", ("MLP", "SAGE"),
        key="sage", pilot=pilot,
    )  # fmt: skip


PAIR, WIDE_PAIR = ("MLP", "GCN"), ("MLP, wide", "GCN, wide")


def populations_planned(graph: str = "populations") -> list[Hypothesis]:
    return [
        ahead(graph, "Mowst* is 5 points ahead of MLP and GCN", "Mowst*", PAIR, bound=0.05),
        ahead(graph, "Mowst is 5 points ahead of MLP and GCN", "Mowst", PAIR, bound=0.05),
        ahead(
            graph, "Mowst* is 5 points ahead of both widened", "Mowst*", WIDE_PAIR, bound=0.05,
            key="experts",
        ),
        ahead(graph, "Mowst* is ahead of SAGE", "Mowst*", ("SAGE",)),
        with_sage(graph, (-0.004, 0.007, "seeds 0 to 2")),
        ahead(
            graph, "Mowst* is ahead of the mean of MLP and GCN", "Mowst*", (MEAN,),
            key="mean, both", pilot=(-0.036, 0.007, "seeds 0 to 2"),
        ),
        ahead(graph, "Mowst* is ahead of Mowst", "Mowst*", ("Mowst",)),
        costs(graph),
        saves(graph, FLOPS, "all at once"),
        saves(graph, ALONE, "one by one", key="saved"),
        *(surer(graph, arm, *FEATURED, "surer" * (arm == "Mowst*")) for arm in MIXTURES),
    ]  # fmt: skip


def misleading_planned(graph: str = "misleading") -> list[Hypothesis]:
    said = "seeds 0 to 2"
    return [
        ahead(
            graph, "Mowst* is ahead of the mean of MLP and GCN", "Mowst*", (MEAN,), key="mean",
            pilot=(0.035, 0.019, said),
        ),
        ahead(graph, "Mowst* is ahead of MLP and GCN", "Mowst*", PAIR),
        ahead(graph, "Mowst* is ahead of both widened", "Mowst*", WIDE_PAIR, key="experts"),
        ahead(graph, "Mowst* is ahead of SAGE", "Mowst*", ("SAGE",), pilot=(-0.060, 0.015, said)),
        with_sage(graph, (0.0064, 0.0043, said)),
        ahead(graph, "Mowst* is ahead of Mowst", "Mowst*", ("Mowst",)),
        saves(graph, ALONE, "one by one", key="saved"),
        *(surer(graph, arm, *FEATURED, "surer" * (arm == "Mowst*")) for arm in MIXTURES),
    ]  # fmt: skip


def repeated(graph: str = "misleading") -> list[Hypothesis]:
    """Returns a study of what ten seeds leave open, with seeds of its own."""
    return [
        with_sage(graph, (-0.0048, 0.0081, "seeds 10 to 19")),
        ahead(graph, "Mowst* is ahead of MLP and GCN", "Mowst*", PAIR),
    ]  # fmt: skip


def films_planned(graph: str = "films") -> list[Hypothesis]:
    return [
        ahead(
            graph, "Mowst* is ahead of MLP and GCN", "Mowst*", PAIR, key="films",
            pilot=(0.020, 0.019, "seeds 0 to 2"),
        ),
        ahead(graph, "Mowst is ahead of MLP and GCN", "Mowst", PAIR),
        ahead(graph, "Mowst* is ahead of both widened", "Mowst*", WIDE_PAIR),
        ahead(graph, "Mowst* is ahead of SAGE", "Mowst*", ("SAGE",)),
        ahead(
            graph, "Mowst* with SAGE is ahead of MLP and SAGE", "Mowst*, SAGE", ("MLP", "SAGE")
        ),
        ahead(graph, "Mowst* is ahead of the mean of MLP and GCN", "Mowst*", (MEAN,)),
        ahead(graph, "Mowst* is ahead of Mowst", "Mowst*", ("Mowst",)),
        costs(graph),
        saves(graph, ALONE, "one by one"),
        surer(graph, "Mowst*", "only MLP right", "only GCN right"),
    ]  # fmt: skip


def pictures(results: Results, graph: str) -> list[Picture]:
    sure: dict[str, dict[str, list]] = {}
    for arm in MIXTURES:
        of_seeds = [c[arm] for c in results.every(graph, "confidence")]
        kinds = list(of_seeds[0])
        sure[arm] = means(kinds, [[c[kind] for c in of_seeds] for kind in kinds])
    arms = list(results.arms())
    short = [arm.removeprefix(f"{graph}: ") for arm in arms]
    scores = means(short, [results.of(arm, ACCURACY) for arm in arms])
    title = f"{graph}: confidence by type of node"
    return [
        Picture("confidence", title, "", "mean C of test nodes", "bars", sure),
        Picture("accuracy", f"{graph}: accuracy by arm", "", "test accuracy", "bars", {"": scores}),
    ]


EXPERIMENT = Experiment(
    "mowst",
    (
        graph_study("mowst-films", "films", 17, 0.4, 10, films_planned()),
        graph_study("mowst-populations", "populations", 18, 0.8, 10, populations_planned()),
        graph_study("mowst-misleading", "misleading", 11, 0.8, 10, misleading_planned()),
        graph_study(
            "mowst-misleading-40", "misleading", 16, 0.4, 40, repeated(),
            size="misleading, more seeds", first_seed=20,
        ),
    ),
    (
        Headline(
            "experts", "Mowst* is ahead of its experts, widened too",
            "ahead on six graphs", "quality",
            shown="each half of the nodes is read better by another expert, and C tells them apart",
        ),
        Headline(
            "mean", "and of the mean of the two, with GCN, where neighbours mislead",
            "not compared", "quality",
            shown="there the GCN is sure and wrong, which a mean cannot mend and C can",
        ),
        Headline(
            "mean, both", "and where neighbours help, or tell nothing", "not compared", "quality",
            contradicted="how sure the GCN is tells the halves apart too: a mean reads it, and C "
            "is a function of the MLP's prediction alone",
        ),
        Headline(
            "films", "Mowst* is ahead of its experts on films", "not used there", "quality",
            shown="likely: features and links tell different films",
        ),
        Headline(
            "sage", "with SAGE as its strong expert, it is ahead of SAGE",
            "ahead with four graph networks", "quality",
            shown="the gain is small, for SAGE weighs a node against its neighbours itself",
            contradicted="SAGE weighs a node against its neighbours itself",
            not_shown="SAGE weighs a node against its neighbours itself",
        ),
        Headline(
            "surer", "C is higher on nodes that features tell", "follows from the loss",
            "mechanism",
            shown="the loss pays for a sure MLP only where it is right",
        ),
        Headline(
            "saved", "a quarter of the FLOPs saved, nodes one by one", "not measured", "cost",
            shown="a node of which the MLP is sure needs none of its neighbours computed; all at "
            "once, others need them",
        ),
    ),
)  # fmt: skip
