"""The work of a graph network for some nodes of a graph.

Letters: N nodes, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from moe_ops.zoo.mowst.graphs import Edges


@dataclass
class Work:
    """The work of a forward: rows that enter a layer and edges it reads, summed over layers.

    layers: rows and edges of each layer.
    """

    rows: int
    edges: int
    all_rows: int
    all_edges: int
    layers: list[tuple[int, int]] = field(default_factory=list)

    @property
    def saved(self) -> float:
        """Share of rows and edges together that are not computed; 0 where there are none."""
        every = self.all_rows + self.all_edges
        return 1 - (self.rows + self.edges) / every if every else 0.0


def work_of(network: Any, nodes: Tensor, edges: Edges) -> Work:
    """Returns the work of `network.at(nodes, x, edges)`, for a `GNN` and a mask [N], and of all
    nodes."""
    needed = network.needed(nodes, edges)
    layers = [
        (int(here.sum()), edges.into(after).index.shape[1]) for here, after in pairwise(needed)
    ]
    rows, read = (sum(column) for column in zip(*layers, strict=True))
    depth = len(layers)
    return Work(rows, read, depth * len(nodes), depth * edges.index.shape[1], layers)
