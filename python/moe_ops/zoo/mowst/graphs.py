"""Graph networks on PyTorch Geometric's convolutions, for all nodes or a subset.

Letters: N nodes, L layers, F features of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_divides

BACKBONES = ("gcn", "sage", "gat", "gin")


class MLP(nn.Module):
    """MLP of L linear maps with batch normalization, ReLU and dropout between them: [N, F] to
    logits."""

    def __init__(
        self, in_size: int, hidden_size: int, out_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = [in_size] + [hidden_size] * (num_layers - 1) + [out_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_size) for _ in range(num_layers - 1))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = F.dropout(F.relu(norm(layer(x))), self.dropout, self.training)
        return self.layers[-1](x)


@dataclass
class Edges:
    """Edges in the form a backbone needs, created once per graph by `GNN.prepare`.

    With weights, edges are in order of their targets, as `neighbor_sum` needs them.
    """

    index: Tensor
    weight: Tensor | None
    _turned: Edges | None = None

    def into(self, targets: Tensor) -> Edges:
        """Returns the edges that end in a node of the mask `targets` [N]."""
        keep = targets[self.index[1]]
        return Edges(self.index[:, keep], None if self.weight is None else self.weight[keep])

    def turned(self) -> Edges:
        """Returns the edges with weights in the reverse direction; computed once."""
        if self._turned is None:
            assert self.weight is not None
            order = self.index[0].argsort(stable=True)
            self._turned = Edges(self.index.flip(0)[:, order], self.weight[order])
        return self._turned


def neighbor_sum(x: Tensor, edges: Edges) -> Tensor:
    """Returns [N, F]: for each node the sum of weight x[source] over its incoming edges.

    One pass over the edges, without a row per edge, forward and backward.
    """
    return _NeighborSum.apply(x, edges)


class _NeighborSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        return _bags(x, edges)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _bags(grad, ctx.edges.turned()), None


def _bags(x: Tensor, edges: Edges) -> Tensor:
    assert edges.weight is not None
    source, target = edges.index
    count = target.bincount(minlength=x.shape[0])
    weight = edges.weight.to(x.dtype)
    return F.embedding_bag(
        source, x.contiguous(), count.cumsum(0) - count, mode="sum", per_sample_weights=weight
    )


class GNN(nn.Module):
    """Graph convolutions with batch normalization, ReLU (ELU for "gat") and dropout between them.

    Args:
        backbone: "gcn", "sage", "gat" or "gin", convolutions of PyTorch Geometric.
        in_size, hidden_size, out_size, num_layers, dropout: see `MLP`.
        heads: of "gat"; hidden layers split their width among them.

    Raises:
        ImportError: PyTorch Geometric is not installed.
        ValueError: an unknown backbone, or heads that do not divide hidden_size.
    """

    def __init__(
        self,
        backbone: str,
        in_size: int,
        hidden_size: int,
        out_size: int,
        num_layers: int,
        dropout: float,
        heads: int = 1,
    ) -> None:
        super().__init__()
        check_choice("GNN", "backbone", backbone, BACKBONES)
        if backbone == "gat":
            check_divides("GNN", "heads", heads, "hidden_size", hidden_size)
        _geometric()
        self.backbone = backbone
        self.dropout = dropout
        self.sizes = sizes = [in_size] + [hidden_size] * (num_layers - 1) + [out_size]
        self.convs = nn.ModuleList(
            self._conv(a, b, heads, last=i == num_layers - 1)
            for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_size) for _ in range(num_layers - 1))

    def _conv(self, a: int, b: int, heads: int, *, last: bool) -> nn.Module:
        convs = _geometric().nn
        if self.backbone == "gcn":
            # `prepare` computes the weights: degrees belong to the whole graph, even for a subset.
            return convs.GCNConv(a, b, normalize=False)
        if self.backbone == "sage":
            return convs.SAGEConv(a, b)
        if self.backbone == "gat":
            size = b if last else b // heads
            return convs.GATConv(a, size, heads=heads, concat=not last)
        inner = nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, b))
        return convs.GINConv(inner)

    def prepare(self, edge_index: Tensor, num_nodes: int) -> Edges:
        """Returns the edges of a graph in the form this backbone needs.

        "gcn" adds self loops and weights, "sage" the weights of a mean.
        """
        if self.backbone not in ("gcn", "sage"):
            return Edges(edge_index, None)
        dtype = next(self.parameters()).dtype
        if self.backbone == "sage":
            edge_index = edge_index[:, edge_index[1].argsort(stable=True)]
            count = edge_index[1].bincount(minlength=num_nodes).to(dtype)
            return Edges(edge_index, 1 / count[edge_index[1]])
        norm = _geometric().nn.conv.gcn_conv.gcn_norm
        index, weight = norm(edge_index, None, num_nodes, False, True, dtype=dtype)
        order = index[1].argsort(stable=True)
        return Edges(index[:, order], weight[order])

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """Maps [N, F] to logits [N, classes]."""
        for i in range(len(self.convs)):
            x = self._layer(i, x, edges)
        return x

    def at(self, nodes: Tensor, x: Tensor, edges: Edges) -> Tensor:
        """Returns logits of only the nodes of the mask `nodes` [N], in their order, with less work
        than `forward`.

        Layer l is computed on the nodes from which a path of at most L - l edges leads to a
        requested node. Only in `eval()`: batch normalization in training reads all nodes.
        """
        if self.training:
            raise ValueError("GNN.at: the network must be in eval(), got train().")
        needed = self.needed(nodes, edges)
        number = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
        x = x[needed[0]]
        for i, (here, after) in enumerate(pairwise(needed)):
            number[here] = torch.arange(x.shape[0], device=x.device)
            part = edges.into(after)
            if x.shape[0]:
                x = self._layer(i, x, Edges(number[part.index], part.weight))
            else:
                x = x.new_empty(0, self.sizes[i + 1])
            x = x[after[here]]
        return x

    def needed(self, nodes: Tensor, edges: Edges) -> list[Tensor]:
        """Returns masks [N] of the nodes needed after 0 to L layers for `nodes` to be known after
        L."""
        found = [nodes]
        for _ in self.convs:
            wanted = found[-1].clone()
            wanted[edges.into(found[-1]).index[0]] = True
            found.append(wanted)
        return found[::-1]

    def _layer(self, i: int, x: Tensor, edges: Edges) -> Tensor:
        conv: Any = self.convs[i]
        # The convolution's own equations, with a sum that creates no row per edge.
        if self.backbone == "gcn":
            x = neighbor_sum(conv.lin(x), edges) + conv.bias
        elif self.backbone == "sage":
            x = conv.lin_l(neighbor_sum(x, edges)) + conv.lin_r(x)
        else:
            x = conv(x, edges.index)
        if i + 1 == len(self.convs):
            return x
        x = self.norms[i](x)
        x = F.elu(x) if self.backbone == "gat" else F.relu(x)
        return F.dropout(x, self.dropout, self.training)


def _geometric() -> Any:
    try:
        import torch_geometric
        import torch_geometric.nn
    except ModuleNotFoundError as error:
        missing = "PyTorch Geometric" if error.name == "torch_geometric" else error.name
        raise ImportError(
            f"moe_ops.zoo: graph networks need {missing}, which is not installed: "
            "pip install torch-moe-ops[graphs]"
        ) from error
    return torch_geometric
