"""Studies of the recipes on generated queries and graphs: small networks, seconds per run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.studies.recipes import forward_gnn, ranking_curriculum

from ..study import Hypothesis
from .setup import Rows, ahead, mlp, steps_of, study

# ---------------------------------------------------------------------------------------- curricula

QUERIES, ANSWERS, FEATURES = 400, 20, 24
EPOCHS, CURRICULUM, WRONG = 20, 20, 0.3


def queries(
    count: int, direction: Tensor, draw: torch.Generator, wrong: float = WRONG
) -> tuple[Tensor, Tensor, Tensor]:
    """x [Q, A, D], the relevant answer's place [Q], and scores [Q, A] of a first ranker: a noisy
    view of relevance. Of some queries the label is at random; the ranker knows better."""
    place = torch.randint(ANSWERS, (count,), generator=draw)
    x = torch.randn(count, ANSWERS, FEATURES, generator=draw)
    meaning = direction * torch.randn(count, 1, generator=draw).abs()
    x[torch.arange(count), place] += 0.8 * meaning
    match = F.one_hot(place, ANSWERS).float()
    scores = match + 0.6 * torch.randn(count, ANSWERS, generator=draw)
    labeled = torch.rand(count, generator=draw) < wrong
    anyone = torch.randint(ANSWERS, (count,), generator=draw)
    return x, torch.where(labeled, anyone, place), scores


def curricula(seed: int) -> Rows:
    rc = ranking_curriculum
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(FEATURES, generator=draw)
    x, place, scores = queries(QUERIES, direction, draw)
    test_x, test_place, _ = queries(2000, direction, draw, 0.0)
    seeming = rc.normalized_score(scores)
    every = torch.arange(QUERIES)
    rows: Rows = {}
    for arm in ("curriculum", "no curriculum", "hardest first"):
        torch.manual_seed(seed)
        model = mlp([FEATURES, 64, 1])
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        order = torch.Generator().manual_seed(seed)
        for epoch in range(steps_of(EPOCHS)):
            for some in every[torch.randperm(QUERIES, generator=order)].split(32):
                other = torch.randint(ANSWERS - 1, (len(some),), generator=order)
                other = other + (other >= place[some]).long()
                s = model(x[some])[..., 0]
                i = torch.arange(len(some))
                weight = None
                if arm != "no curriculum":
                    easy = rc.pairwise_easiness(seeming[some, place[some]], seeming[some, other])
                    weight = rc.curriculum_weight(easy, epoch, CURRICULUM, anti=arm[0] == "h")
                loss = rc.pairwise_loss(s[i, place[some]], s[i, other], weight)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            ranked = model(test_x)[..., 0].argsort(1, descending=True)
        rank = (ranked == test_place[:, None]).long().argmax(1) + 1
        rows[arm] = {
            "P@1": float((rank == 1).double().mean()),
            "MRR": float((1 / rank.double()).mean()),
        }
    return rows


CURRICULA = study(
    "curriculum", "curricula", 60, 0.5, curricula,
    [
        Hypothesis(
            "a curriculum raises P@1", ahead("curriculum", "no curriculum", "P@1"), "P@1",
            below=False, key="curriculum",
        ),
        Hypothesis(
            "and is better than hardest first", ahead("curriculum", "hardest first", "P@1"), "P@1",
            below=False, key="anti",
        ),
    ],
    {
        "Data": f"{QUERIES} generated queries of {ANSWERS} answers, one relevant; labels of "
        f"{100 * WRONG:.0f} % at random; a first ranker of score relevance + 0.6 noise, "
        "min-max normalised",
        "Model": f"{FEATURES}-64-1",
        "Training": f"Adam 2e-3, {EPOCHS} epochs of pairs, curriculum over {CURRICULUM}",
    },
    seeds=16,
)  # fmt: skip

# -------------------------------------------------------------------------------------- ForwardGNN

NODES, CLASSES, OF_NODE = 1500, 5, 16


def graph_of(seed: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Nodes of five classes with weak features; seven of ten edges are inside a class."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (NODES,), generator=draw)
    centers = F.normalize(torch.randn(CLASSES, OF_NODE, generator=draw), dim=1)
    x = 1.5 * centers[y] + torch.randn(NODES, OF_NODE, generator=draw)
    source = torch.randint(NODES, (NODES * 4,), generator=draw)
    target = torch.randint(NODES, (NODES * 4,), generator=draw)
    inside = torch.rand(NODES * 4, generator=draw) < 0.7
    for c in range(CLASSES):
        mine = inside & (y[source] == c)
        pool = (y == c).nonzero()[:, 0]
        target[mine] = pool[torch.randint(len(pool), (int(mine.sum()),), generator=draw)]
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    part = torch.rand(NODES, generator=draw)
    return x, edges, y, (part < 0.2, (part >= 0.2) & (part < 0.4), part >= 0.4)


class Whole(nn.Module):
    """A network of the same layers under one loss, with a linear map to classes."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(F.normalize(x, dim=1), edges)
        return self.out(x)


def forward_only(seed: int) -> Rows:
    x, edges, y, (train, valid, test) = graph_of(seed)
    rows: Rows = {}

    def layers() -> list[nn.Module]:
        torch.manual_seed(seed)
        return [forward_gnn.MeanConv(a, 64) for a in (OF_NODE, 64)]

    for arm, both in (("forward", True), ("forward, edges to classes alone", False)):
        draw = torch.Generator().manual_seed(seed)
        graph = forward_gnn.with_class_nodes(x, edges, y, train, CLASSES, draw, both_ways=both)
        net = forward_gnn.ForwardGNN(layers())
        net.fit(graph, y, train, valid, steps=steps_of(300), rate=3e-3)
        with torch.no_grad():
            right = net(graph).argmax(1) == y
        rows[arm] = {"test accuracy": float(right[test].double().mean())}
    for arm, there in (("back-propagation", edges), ("without the graph", edges[:, :0])):
        model = Whole(layers())
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        best, found = -1.0, 0.0
        for _ in range(steps_of(300)):
            logits = model(x, there)
            right = (logits.argmax(1) == y).double()
            if float(right[valid].mean()) > best:
                best, found = float(right[valid].mean()), float(right[test].mean())
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits[train], y[train]).backward()
            optimizer.step()
        rows[arm] = {"test accuracy": found}
    return rows


FORWARD = study(
    "forward-gnn", "ForwardGNN", 60, 0.6, forward_only,
    [
        Hypothesis(
            "learning layer by layer is at most 0.02 behind back-propagation",
            ahead("forward", "back-propagation"), "accuracy", -0.02, False, "forward",
        ),
        Hypothesis(
            "and ahead of the same network without the graph",
            ahead("forward", "without the graph"), "accuracy", below=False, key="graph",
        ),
        Hypothesis(
            "edges to the classes alone are better than edges both ways",
            ahead("forward, edges to classes alone", "forward"), "accuracy", below=False,
            key="one way",
        ),
    ],
    {
        "Data": f"{NODES} nodes of {CLASSES} classes, {OF_NODE} weak features, 7 of 10 edges "
        "inside a class; 20 % train, 20 % validate, 60 % test",
        "Model": "two layers of 64 (mean of neighbours)",
        "Training": "Adam 3e-3, 300 steps (a layer, or of the whole), best by validation",
    },
)  # fmt: skip

STUDIES = (CURRICULA, FORWARD)
