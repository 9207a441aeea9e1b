"""Models and graphs of the tests of Mowst."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from bench.studies.mowst.graphs import Graph
from torch import Tensor, nn

from moe_ops.zoo.mowst import Mowst, MowstConfig
from moe_ops.zoo.mowst.graphs import Edges

N, CLASSES = 40, 4

has_geometric = importlib.util.find_spec("torch_geometric") is not None

geometric = pytest.mark.skipif(not has_geometric, reason="PyTorch Geometric is not installed")


class Neighbors(nn.Module):
    """A strong expert without PyTorch Geometric: the mean of the neighbors through an MLP.

    It does not see a node's own features.
    """

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_size, hidden_size)
        self.second = nn.Linear(hidden_size, out_size)

    def prepare(self, edge_index: Tensor, num_nodes: int) -> Edges:
        return Edges(edge_index, None)

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        source, target = edges.index
        total = torch.zeros_like(x).index_add(0, target, x[source])
        count = torch.zeros_like(x[:, :1]).index_add(0, target, torch.ones_like(x[source, :1]))
        return self.second(F.relu(self.first(total / count.clamp(min=1))))

    def at(self, nodes: Tensor, x: Tensor, edges: Edges) -> Tensor:
        return self(x, edges.into(nodes))[nodes]

    def needed(self, nodes: Tensor, edges: Edges) -> list[Tensor]:
        return [nodes, nodes]


def make(**changes) -> Mowst:
    config = MowstConfig(**{"hidden_size": 16, "dropout": 0.0, **changes})
    strong = Neighbors(config.in_size, config.hidden_size, config.num_classes)
    return Mowst(config, strong)


def random_graph(nodes: int = N, edges: int = 120) -> Graph:
    draw = torch.rand(nodes)
    return Graph(
        torch.randn(nodes, 16),
        torch.randint(nodes, (2, edges)),
        torch.randint(CLASSES, (nodes,)),
        draw < 0.5,
        (draw >= 0.5) & (draw < 0.75),
        draw >= 0.75,
    )
