"""ForwardGNN: a graph network learns layer by layer, without a backward pass through layers and
without negative examples, from virtual nodes that stand for the classes.

Letters: N nodes, C classes, F features.

Source: Park et al. 2024 (Forward Learning of Graph Neural Networks, ICLR, arXiv 2403.11004), the
single-forward method (SF).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ClassGraph:
    """A graph with a node for each class behind its own, linked with the training nodes of it.

    Attributes:
        x: [N + C, F], the last C rows drawn from N(0, 1).
        edge_index: [2, edges]; a training node and its class are linked, and no other node is
            linked with a class.
        num_classes: C.
    """

    x: Tensor
    edge_index: Tensor
    num_classes: int


def with_class_nodes(
    x: Tensor,
    edge_index: Tensor,
    y: Tensor,
    train: Tensor,
    num_classes: int,
    generator: torch.Generator | None = None,
    *,
    both_ways: bool = True,
) -> ClassGraph:
    """Adds the virtual nodes.

    Args:
        x: [N, F]. edge_index: [2, edges], from row 0 to row 1.
        y: [N] classes; those outside of `train` are not read.
        train: [N] bool.
        generator: of the features of class nodes.
        both_ways: as published, a training node reads the node of its class too. It can then tell
            its class by that, which no other node can; False leaves the edges to classes alone.
    """
    num_nodes = x.shape[0]
    features = torch.randn(num_classes, x.shape[1], generator=generator).to(x)
    nodes = train.nonzero()[:, 0]
    to_class = torch.stack([nodes, num_nodes + y[nodes]])
    edges = torch.cat([edge_index, to_class, *[to_class.flip(0)] * both_ways], dim=1)
    return ClassGraph(torch.cat([x, features]), edges, num_classes)


class MeanConv(nn.Module):
    """relu(W x_i + V mean of x_j over edges j -> i + b); the mean of nothing is 0."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.own = nn.Linear(in_size, out_size)
        self.others = nn.Linear(in_size, out_size, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        total = torch.zeros_like(x).index_add(0, target, x[source])
        degree = target.bincount(minlength=x.shape[0]).clamp(min=1)
        return F.relu(self.own(x) + self.others(total / degree[:, None]))


class ForwardGNN(nn.Module):
    """Layers that are trained one after the other, each with the ones below it frozen.

    Args:
        layers: modules (x [N, F], edge_index [2, edges]) -> [N, F'], `MeanConv` or convolutions of
            PyTorch Geometric.
        temperature: that scores are divided by.
    """

    def __init__(self, layers: Iterable[nn.Module], temperature: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.temperature = temperature

    def layer_scores(self, layer: nn.Module, x: Tensor, graph: ClassGraph) -> tuple[Tensor, Tensor]:
        """Returns the output of a layer for x [N + C, F], whose rows it sees with length 1, and the
        scores [N, C] h_i . h_class / temperature."""
        h = layer(F.normalize(x, dim=1), graph.edge_index)
        nodes, classes = h[: -graph.num_classes], h[-graph.num_classes :]
        return h, nodes @ classes.T / self.temperature

    def forward(self, graph: ClassGraph) -> Tensor:
        """[N, C]: the sum over layers of softmax(scores)."""
        x, total = graph.x, torch.zeros(())
        for layer in self.layers:
            x, scores = self.layer_scores(layer, x, graph)
            total = total + scores.softmax(1)
        return total

    def fit(
        self,
        graph: ClassGraph,
        y: Tensor,
        train: Tensor,
        valid: Tensor | None = None,
        *,
        steps: int = 300,
        rate: float = 1e-3,
        patience: int = 100,
    ) -> list[list[float]]:
        """Trains each layer with Adam on the cross-entropy of the training nodes' scores.

        Args:
            y: [N]. train, valid: [N] bool; with `valid` a layer stops after `patience` steps
                without a better accuracy there, and keeps its best weights.

        Returns:
            The losses of each layer.
        """
        x, history = graph.x, []
        for layer in self.layers:
            optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
            losses: list[float] = []
            best, best_step, kept = -1.0, 0, copy.deepcopy(layer.state_dict())
            for step in range(steps):
                _, scores = self.layer_scores(layer, x, graph)
                loss = F.cross_entropy(scores[train], y[train])
                if valid is not None:
                    share = float((scores[valid].argmax(1) == y[valid]).double().mean())
                    if share > best:
                        best, best_step, kept = share, step, copy.deepcopy(layer.state_dict())
                    elif step - best_step >= patience:
                        break
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
            if valid is not None:
                layer.load_state_dict(kept)
            with torch.no_grad():
                x, _ = self.layer_scores(layer, x, graph)
            history.append(losses)
        return history
