"""Mowst beside its experts alone: does each take the nodes it can do, and what does that save?

    python -m bench.experiments.mowst --seeds 3

Three graphs. `two_populations` (drawn anew by seed) needs both experts: an MLP can do its feature
nodes, a GCN its structure nodes. Digits linked to their nearest ones, where features suffice, and
films of MovieLens 100k linked by cast and crew, where neighbours tell little, are left out where
scikit-learn or recbole is not installed. Every stage keeps the epoch of the lowest validation loss;
warm-up and form of the confidence are chosen on validation accuracy; numbers are of test nodes.
Needs PyTorch Geometric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments import command, matching
from bench.experiments.mowst_data import digits, films
from bench.experiments.picture import Picture
from bench.experiments.report import Claim, Report, means
from moe_ops.zoo.mowst import Mowst, MowstConfig, MowstOutput, expected_accuracy
from moe_ops.zoo.mowst.graphs import Graph, two_populations
from moe_ops.zoo.mowst.training import fit

NODES, SIGNAL, WEAK_SIGNAL = 6000, 2.5, 0.7
EPOCHS, PATIENCE, ROUNDS, ROUND_PATIENCE, LR = 300, 30, 3, 1, 1e-2
# Warm-up and confidence.
CANDIDATES = (
    ("none", "variance"),
    ("none", "monotone"),
    ("both", "variance"),
    ("both", "monotone"),
    ("both", "free"),
)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
COLUMNS = (
    "test accuracy",
    "mean C",
    "sent to the strong expert",
    "rows saved",
    "FLOPs saved",
    "FLOPs saved, one by one",
    "accuracy when saving",
    "parameters",
)
ACCURACY, C, SENT, ROWS, FLOPS, ALONE, SAVING = range(7)
ONE_BY_ONE = 200
MEAN = "mean of MLP and GCN"
MIXTURES = ("Mowst", "Mowst*", "Mowst*, SAGE")


@dataclass(frozen=True)
class Case:
    """A graph, and the sizes of the experts on it. `types`: names of kinds of nodes, masks."""

    name: str
    graph: Graph
    hidden_size: int
    dropout: float
    types: Mapping[str, Tensor] = field(default_factory=dict)

    def config(self, **changes: object) -> MowstConfig:
        base = MowstConfig(
            in_size=self.graph.x.shape[1],
            num_classes=int(self.graph.y.max()) + 1,
            hidden_size=self.hidden_size,
            dropout=self.dropout,
        )
        return replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Found:
    """What one seed gave on one graph: rows of the table, mean C by type, what was chosen."""

    rows: dict[str, list[float | None]] = field(default_factory=dict)
    confidence: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


def cases(seed: int, log: Callable[[str], None]) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    graph, featured = two_populations(
        NODES, signal=SIGNAL, weak_signal=WEAK_SIGNAL, generator=generator
    )
    types = {"feature nodes": featured, "structure nodes": ~featured}
    found = [Case("populations", graph, 16, 0.0, types)]
    for name, package, make in (("digits", "scikit-learn", digits), ("films", "recbole", films)):
        real = make(seed)
        if real is None:
            log(f"{package} is not installed: the graph of {name} is left out")
        else:
            found.append(Case(name, real, 32, 0.5))
    return found


# --------------------------------------------------------------------------------- one seed


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def widened(case: Case, target: int) -> MowstConfig:
    """The width at which the GCN comes nearest to `target` parameters; the MLP has its width."""

    def parameters(width: int) -> int:
        return size(Mowst(case.config(hidden_size=width)).strong)

    return case.config(hidden_size=matching.width(parameters, target))


def settings() -> dict[str, Any]:
    """Of every stage."""
    return {"epochs": EPOCHS, "patience": PATIENCE, "lr": LR, "progress": False}


def experts(config: MowstConfig, case: Case, seed: int) -> Mowst:
    """Both experts of the config, each trained by itself."""
    torch.manual_seed(seed)
    model = Mowst(replace(config, joint=False))
    # Without a round, warm-up is all.
    fit(model, case.graph, warm_up="both", rounds=0, **settings())
    return model.eval()


def output_of(model: Mowst, graph: Graph) -> MowstOutput:
    with torch.no_grad():
        return model.eval()(graph.x, model.strong.prepare(graph.edge_index, graph.x.shape[0]))


def take(output: MowstOutput, nodes: Tensor) -> MowstOutput:
    return MowstOutput(*(t[nodes] for t in output))


def accuracy(probs: Tensor, graph: Graph, nodes: Tensor) -> float:
    return float((probs.argmax(-1) == graph.y)[nodes].double().mean())


def mixture(
    case: Case, seed: int, *, joint: bool, warm_up: str, form: str, alone: Mowst
) -> tuple[float, Mowst]:
    """Trains Mowst (joint: Mowst*); its validation accuracy, and the model.

    A warm-up of both is the experts that were trained alone.
    """
    torch.manual_seed(seed)
    model = Mowst(replace(alone.config, joint=joint, confidence=form))
    if warm_up == "both":
        model.weak.load_state_dict(alone.weak.state_dict())
        model.strong.load_state_dict(alone.strong.state_dict())
    fit(model, case.graph, rounds=ROUNDS, round_patience=ROUND_PATIENCE, **settings())
    graph = case.graph
    found = take(output_of(model, graph), graph.valid)
    mode = "mixed" if joint else "stochastic"
    return float(expected_accuracy(found, graph.y[graph.valid], mode=mode)), model


def threshold(output: MowstOutput, graph: Graph) -> float:
    """The lowest of THRESHOLDS that costs no validation accuracy against the full mixture."""
    mixed, weak = output.log_probs(), output.weak_logits
    full = accuracy(mixed, graph, graph.valid)
    for value in THRESHOLDS:
        probs = torch.where((output.confidence >= value)[:, None], weak, mixed)
        if accuracy(probs, graph, graph.valid) >= full:
            return value
    return THRESHOLDS[-1]


def flops(sizes: Sequence[int], layers: Sequence[tuple[int, int]], backbone: str = "gcn") -> float:
    """Of rows and edges computed in each layer; of an MLP, where edges are 0.

    SAGE has a second product for the node itself, and sums rows before them.
    """
    total, sage = 0, backbone == "sage"
    for a, b, (rows, edges) in zip(sizes, sizes[1:], layers, strict=False):
        total += 2 * rows * a * b * (2 if sage else 1) + 2 * edges * (a if sage else b)
    return float(total)


def one_by_one(model: Mowst, case: Case, used: Tensor, generator: torch.Generator) -> float:
    """Share of FLOPs saved where some test nodes are asked for one at a time.

    A node then costs the MLP on itself and, where `used` [N] says so, the strong expert on its
    neighbourhood.
    """
    graph, sizes, backbone = case.graph, model.strong.sizes, model.config.backbone
    edges = model.strong.prepare(graph.edge_index, len(graph.y))
    nodes = graph.test.nonzero()[:, 0]
    nodes = nodes[torch.randperm(len(nodes), generator=generator)[:ONE_BY_ONE]]
    weak, spent, every = flops(sizes, [(1, 0)] * (len(sizes) - 1)), 0.0, 0.0
    for node in nodes.tolist():
        mask = torch.zeros_like(used)
        mask[node] = True
        with torch.no_grad():
            _, work = model.strong.at(mask, graph.x, edges)
        cost = flops(sizes, work.layers, backbone)
        spent += weak + cost * bool(used[node])
        every += weak + cost
    return 1 - spent / every


def predicted(model: Mowst, case: Case, seed: int) -> list[float | None]:
    """The row of a trained mixture."""
    graph, joint = case.graph, model.config.joint
    output, count = output_of(model, graph), graph.x.shape[0]
    # Not the numbers that the nodes were split by.
    generator = torch.Generator().manual_seed(10_000 + seed)
    found = model.predict(
        graph.x,
        graph.edge_index,
        threshold=threshold(output, graph) if joint else 1.0,
        generator=generator,
    )
    test, sizes, work = graph.test, model.strong.sizes, found.work
    depth = len(sizes) - 1
    weak = flops(sizes, [(count, 0)] * depth)
    backbone = model.config.backbone
    every = flops(sizes, [(count, work.all_edges // depth)] * depth, backbone)
    exact = expected_accuracy(
        take(output, test), graph.y[test], mode="mixed" if joint else "stochastic"
    )
    return [
        float(exact),
        float(output.confidence[test].double().mean()),
        float(found.used_strong[test].double().mean()),
        1 - work.rows / work.all_rows,
        1 - (weak + flops(sizes, work.layers, backbone)) / (weak + every),
        one_by_one(model, case, found.used_strong, generator),
        accuracy(found.probs, graph, test),
        size(model),
    ]


def measure(case: Case, seed: int) -> Found:
    """Trains every arm on one graph."""
    graph, found = case.graph, Found()
    alone = experts(case.config(), case, seed)
    target = size(Mowst(case.config()))
    wide = experts(widened(case, target), case, seed)
    sage = experts(case.config(backbone="sage"), case, seed)

    weak, strong, _ = output_of(alone, graph)
    probs = {
        "MLP": (weak, size(alone.weak)),
        "GCN": (strong, size(alone.strong)),
        "MLP, wide": (output_of(wide, graph).weak_logits, size(wide.weak)),
        "GCN, wide": (output_of(wide, graph).strong_logits, size(wide.strong)),
        "SAGE": (output_of(sage, graph).strong_logits, size(sage.strong)),
        MEAN: (
            weak.softmax(-1) + strong.softmax(-1),
            size(alone.weak) + size(alone.strong),
        ),
    }
    for arm, (p, parameters) in probs.items():
        found.rows[arm] = [accuracy(p, graph, graph.test), *[None] * 6, parameters]

    types = dict(case.types)
    if not types:
        right = [t.argmax(-1) == graph.y for t in (weak, strong)]
        types = {"only MLP right": right[0] & ~right[1], "only GCN right": right[1] & ~right[0]}
    for arm, joint, pair in (
        ("Mowst", False, alone),
        ("Mowst*", True, alone),
        ("Mowst*, SAGE", True, sage),
    ):
        best, model, chosen = -1.0, None, ""
        for warm_up, form in CANDIDATES:
            value, candidate = mixture(
                case, seed, joint=joint, warm_up=warm_up, form=form, alone=pair
            )
            if value > best:
                best, model, chosen = value, candidate, f"{form} after warm-up {warm_up}"
        assert model is not None
        found.rows[arm] = predicted(model, case, seed)
        found.chosen[arm] = chosen
        c = output_of(model, graph).confidence
        found.confidence[arm] = {
            name: float(c[graph.test & mask].double().mean())
            for name, mask in types.items()
            if bool((graph.test & mask).any())
        }
    return found


# ----------------------------------------------------------------------------------- the run


def run(seeds: Sequence[int], log: Callable[[str], None]) -> Report:
    """Trains every arm on every graph with every seed."""
    results: dict[str, list[Found]] = {}
    sizes: dict[str, str] = {}
    for seed in seeds:
        for case in cases(seed, log):
            graph = case.graph
            sizes[case.name] = (
                f"{case.name}: {len(graph.y)} nodes, {graph.edge_index.shape[1]} edges, "
                f"{int(graph.y.max()) + 1} classes, width {case.hidden_size}, dropout "
                f"{case.dropout:g}"
            )
            found = measure(case, seed)
            results.setdefault(case.name, []).append(found)
            for arm, row in found.rows.items():
                chosen = found.chosen.get(arm)
                log(
                    f"seed {seed}, {case.name}, {arm}: accuracy {row[ACCURACY]:.3f}"
                    + (f" ({chosen})" if chosen else "")
                )
    return report_of(results, sizes)


def report_of(results: Mapping[str, list[Found]], sizes: Mapping[str, str]) -> Report:
    chosen = []
    for name, found in results.items():
        for arm in MIXTURES:
            counts = Counter(f.chosen[arm] for f in found)
            shown = ", ".join(f"{form} ({n})" for form, n in counts.most_common())
            chosen.append(f"{arm} on {name}: {shown}")
    candidates = ", ".join(f"{form} after {warm_up}" for warm_up, form in CANDIDATES)
    report = Report(
        "mowst",
        {
            "Graphs": "; ".join(sizes.values()) + "; 40 % train, 20 % validate, 40 % test",
            "Training": f"two layers, AdamW {LR:g}, at most {EPOCHS} epochs a stage, patience "
            f"{PATIENCE}, Mowst at most {ROUNDS} rounds of turns; the best epoch by validation "
            "loss",
            "Confidence": f"chosen by validation accuracy for each seed from (form after warm-up): "
            f"{candidates}. Chosen: {'; '.join(chosen)}",
            "Parameters": "MLP and GCN alone are as wide as inside Mowst; the wide ones, whose "
            "width is the same for both, have as many as Mowst in all, and SAGE about as many",
            "Saved": "of rows of the GCN, and of FLOPs of both experts, where all nodes are "
            f"predicted at once; one by one: where {ONE_BY_ONE} test nodes are asked for one at a "
            "time, each for the neighbourhood that its layers read. Mowst: the "
            "draw decides (accuracy is the mean over draws, accuracy when saving that of one). "
            "Mowst*: nodes of C above a threshold get the MLP alone, the lowest of "
            f"{', '.join(f'{t:g}' for t in THRESHOLDS)} that costs no validation accuracy",
        },
        COLUMNS,
    )
    for name, found in results.items():
        for arm in found[0].rows:
            report.arms[f"{name}: {arm}"] = [f.rows[arm] for f in found]
    report.claims = claims(results)
    report.pictures = pictures(results)
    return report


def gaps(found: Sequence[Found], arm: str, others: Sequence[str], i: int) -> list[float]:
    """Column i of the arm minus the best of the others, by seed."""

    def value(f: Found, name: str) -> float:
        number = f.rows[name][i]
        assert number is not None
        return number

    return [value(f, arm) - max(value(f, other) for other in others) for f in found]


def claims(results: Mapping[str, list[Found]]) -> list[Claim]:
    listed = []

    def above(name: str, statement: str, arm: str, others: Sequence[str], bound: float) -> None:
        ahead = gaps(results[name], arm, others, ACCURACY)
        listed.append(Claim(f"{name}: {statement}", ahead, "accuracy", bound=bound, below=False))

    alone, wide = ("MLP", "GCN"), ("MLP, wide", "GCN, wide")
    for name, found in results.items():
        bound = 0.05 if name == "populations" else 0.0
        points = "5 points " if bound else ""
        for arm in ("Mowst*", "Mowst"):
            above(name, f"{arm} is {points}ahead of MLP and GCN", arm, alone, bound)
        above(name, f"Mowst* is {points}ahead of both widened", "Mowst*", wide, bound)
        above(name, "Mowst* is ahead of SAGE", "Mowst*", ("SAGE",), 0.0)
        statement = "Mowst* with SAGE is ahead of MLP and SAGE"
        above(name, statement, "Mowst*, SAGE", ("MLP", "SAGE"), 0.0)
        above(name, "Mowst* is ahead of the mean of MLP and GCN", "Mowst*", (MEAN,), 0.0)
        above(name, "Mowst* is ahead of Mowst", "Mowst*", ("Mowst",), 0.0)
        rows = [f.rows["Mowst*"] for f in found]
        lost = [(row[ACCURACY] or 0.0) - (row[SAVING] or 0.0) for row in rows]
        statement = f"{name}: what Mowst* saves costs less than half a point"
        listed.append(Claim(statement, lost, "accuracy", bound=0.005))
        for i, how in ((FLOPS, "all at once"), (ALONE, "one by one")):
            saved = [row[i] or 0.0 for row in rows]
            statement = f"{name}: Mowst* saves a quarter of the FLOPs, nodes {how}"
            listed.append(Claim(statement, saved, "of all", bound=0.25, below=False))
        for arm in MIXTURES:
            by_type = [list(f.confidence[arm].values()) for f in found]
            if all(len(values) == 2 for values in by_type):
                first, second = found[0].confidence[arm]
                statement = f"{name}: {arm} is surer of {first} than of {second}"
                apart = [a - b for a, b in by_type]
                listed.append(Claim(statement, apart, "C", below=False))
    return listed


def pictures(results: Mapping[str, list[Found]]) -> list[Picture]:
    sure: dict[str, dict[str, list]] = {}
    for arm in MIXTURES:
        kinds: dict[str, list[float]] = {}
        for name, found in results.items():
            for f in found:
                for kind, value in f.confidence[arm].items():
                    kinds.setdefault(f"{name}: {kind}", []).append(value)
        sure[arm] = means(list(kinds), list(kinds.values()))
    # One less than there are colours.
    arms = [arm for arm in next(iter(results.values()))[0].rows if arm != "MLP, wide"]
    scores = {
        arm: means(
            list(results),
            [[f.rows[arm][ACCURACY] or 0.0 for f in found] for found in results.values()],
        )
        for arm in arms
    }
    return [
        Picture(
            "confidence", "Confidence by type of node", "", "mean C of test nodes", "bars", sure
        ),
        Picture("accuracy", "Accuracy by arm and graph", "", "test accuracy", "bars", scores),
    ]


if __name__ == "__main__":
    command.main("mowst", run)
