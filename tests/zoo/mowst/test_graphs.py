"""Graph networks against PyTorch Geometric, and what a node costs."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from bench.studies.mowst.work import work_of

from moe_ops.zoo.mowst import Mowst, MowstConfig
from moe_ops.zoo.mowst.graphs import BACKBONES, GNN, Edges, neighbor_sum

from .common import CLASSES, N, geometric, random_graph


@geometric
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_some_nodes_cost_less_and_are_the_same(backbone, num_layers):
    graph = random_graph(200, 260)
    net = GNN(backbone, 16, 8, CLASSES, num_layers, 0.5, heads=2 if backbone == "gat" else 1)
    edges = net.prepare(graph.edge_index, 200)
    net(graph.x, edges)  # moves running statistics
    net.eval()
    every = net(graph.x, edges)
    for share in (0.0, 0.05, 1.0):
        nodes = torch.rand(200) < share
        part, work = net.at(nodes, graph.x, edges), work_of(net, nodes, edges)
        torch.testing.assert_close(part, every[nodes], atol=1e-5, rtol=1e-4)
        assert work.all_rows == 200 * num_layers
        assert work.layers[-1] == (work.layers[-1][0], int(nodes[edges.index[1]].sum()))
        assert [sum(column) for column in zip(*work.layers, strict=True)] == [work.rows, work.edges]
        if share == 1.0:
            assert work.saved == 0
        elif share == 0.0:
            assert work.saved == 1
        else:
            assert 0.2 < work.saved < 1
    with pytest.raises(ValueError, match=r"^GNN.at: .*eval"):
        net.train().at(nodes, graph.x, edges)


def test_neighbor_sum_is_its_formula():
    # Node 3 is no target, node 2 no source; one edge is there twice.
    target = torch.tensor([0, 0, 1, 1, 1, 2])
    source = torch.tensor([1, 3, 0, 0, 4, 3])
    weight = torch.rand(6, dtype=torch.float64)
    edges = Edges(torch.stack([source, target]), weight)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix.index_put_((target, source), weight, accumulate=True)
    torch.testing.assert_close(neighbor_sum(x, edges), matrix @ x)
    assert torch.autograd.gradcheck(lambda t: neighbor_sum(t, edges), x)


@geometric
@pytest.mark.parametrize("backbone", ["gcn", "sage"])
def test_layers_are_those_of_geometric(backbone):
    graph = random_graph()
    net = GNN(backbone, 16, 8, CLASSES, 1, 0.0).double()
    x, weights = graph.x.double().requires_grad_(), list(net.parameters())
    edges = net.prepare(graph.edge_index, N)
    given = (edges.index, edges.weight) if backbone == "gcn" else (graph.edge_index,)
    ours, theirs = net(x, edges), net.convs[0](x, *given)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(t.square().sum(), [x, *weights]) for t in (ours, theirs)]
    torch.testing.assert_close(*grads)


@geometric
def test_gcn_is_its_formula():
    graph = random_graph()
    # One edge between two nodes, and none from a node to itself.
    source, target = graph.edge_index.unique(dim=1)
    edge_index = torch.stack([source, target])[:, source != target]
    net = GNN("gcn", 16, 8, CLASSES, 1, 0.0).double()
    adjacency = torch.eye(N, dtype=torch.float64)
    for source, target in edge_index.T.tolist():
        adjacency[target, source] = 1
    degree = adjacency.sum(1)
    normal = adjacency / degree.sqrt()[:, None] / degree.sqrt()
    conv = net.convs[0]
    expected = normal @ (graph.x.double() @ conv.lin.weight.T) + conv.bias
    torch.testing.assert_close(net(graph.x.double(), net.prepare(edge_index, N)), expected)


@geometric
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_node_pays_for_its_neighborhood_and_no_more(backbone):
    # A path 0 -> 1 -> ... -> 9. Node 5 after two layers needs 4 and 5 after one, and 3, 4 and 5.
    edge_index = torch.stack([torch.arange(9), torch.arange(1, 10)])
    net = GNN(backbone, 16, 8, CLASSES, 2, 0.0).eval()
    x, nodes = torch.randn(10, 16), torch.arange(10) == 5
    edges = net.prepare(edge_index, 10)
    expected = net(x, edges)[nodes]
    x[:3], x[6:] = math.nan, math.nan
    torch.testing.assert_close(net.at(nodes, x, edges), expected)
    loops = backbone == "gcn"
    assert work_of(net, nodes, edges).layers == [(3, 2 + 2 * loops), (2, 1 + loops)]


def test_without_geometric_one_sentence_says_what_to_install(monkeypatch):
    for name in ("torch_geometric", "torch_geometric.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install torch-moe-ops\[graphs\]"):
        Mowst(MowstConfig())


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    """PyTorch Geometric may be installed without a package that it imports."""
    (tmp_path / "torch_geometric").mkdir()
    (tmp_path / "torch_geometric" / "__init__.py").write_text("import a_dependency\n")
    for name in [name for name in sys.modules if name.startswith("torch_geometric")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"need a_dependency, which is not installed"):
        GNN("gcn", 16, 8, CLASSES, 2, 0.5)
