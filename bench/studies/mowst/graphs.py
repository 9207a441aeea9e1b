"""Graphs with classes of their nodes, and a generated one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Graph:
    """A graph whose nodes have features and classes.

    Attributes:
        x: [N, F] floats. edge_index: [2, edges], from row 0 to row 1. y: [N] classes.
        train, valid, test: [N] bool.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        num_nodes = self.x.shape[0]
        for name in ("y", "train", "valid", "test"):
            t = getattr(self, name)
            if t.shape != (num_nodes,):
                raise ValueError(f"Graph: {name} must be [{num_nodes}], got shape {list(t.shape)}.")
        edges = self.edge_index
        if edges.dim() != 2 or edges.shape[0] != 2:
            raise ValueError(
                f"Graph: edge_index must be [2, edges], got shape {list(edges.shape)}."
            )
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= num_nodes):
            raise ValueError(
                f"Graph: edge_index must be in [0, {num_nodes}), got {int(edges.min())} to "
                f"{int(edges.max())}."
            )


def two_populations(
    num_nodes: int = 6000,
    num_classes: int = 4,
    num_features: int = 16,
    *,
    degree: int = 6,
    signal: float = 2.0,
    weak_signal: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Graph, Tensor]:
    """A graph that no single expert can do: half the nodes are told by features, half by structure.

    Feature nodes have features around their class's center (`signal` deviations from the origin)
    and neighbors of any class. Structure nodes have little of it (`weak_signal`) and neighbors of
    their own class, but for one. The two halves are not linked, for otherwise structure nodes could
    read their class off feature nodes. Edges go both ways. 40 % of the nodes train, 20 % validate,
    40 % test.

    Returns:
        the graph, and [N] bool, True for feature nodes.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    y = torch.randint(num_classes, (num_nodes,), generator=generator)
    featured = torch.arange(num_nodes) < num_nodes // 2
    centers = F.normalize(torch.randn(num_classes, num_features, generator=generator), dim=1)
    scale = torch.where(featured, signal, weak_signal)[:, None]
    x = scale * centers[y] + torch.randn(num_nodes, num_features, generator=generator)

    sources, targets = [], []
    for half in (featured, ~featured):
        nodes = half.nonzero()[:, 0]
        source = nodes.repeat_interleave(degree)
        target = nodes[(uniform(source.shape[0]) * len(nodes)).long()]
        if not bool(half[0]):
            # All but the last of a structure node's edges end in its own class.
            pools = [nodes[y[nodes] == c] for c in range(num_classes)]
            draw = uniform(source.shape[0])
            same = torch.empty_like(target)
            for c, pool in enumerate(pools):
                mine = y[source] == c
                same[mine] = pool[(draw[mine] * len(pool)).long()]
            own = torch.arange(source.shape[0]) % degree < degree - 1
            target = torch.where(own, same, target)
        sources.append(source)
        targets.append(target)
    source, target = torch.cat(sources), torch.cat(targets)
    keep = source != target
    both = torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)
    edge_index = both[:, keep.repeat(2)].unique(dim=1)
    draw = uniform(num_nodes)
    graph = Graph(x, edge_index, y, draw < 0.4, (draw >= 0.4) & (draw < 0.6), draw >= 0.6)
    return graph, featured
