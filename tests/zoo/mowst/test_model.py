from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.zoo.mowst import (
    CONFIDENCES,
    Mowst,
    MowstConfig,
    MowstOutput,
    dispersion,
    expected_accuracy,
    make_confidence,
    mixed_log_probs,
    mowst_loss,
)
from moe_ops.zoo.mowst.graphs import (
    BACKBONES,
    GNN,
    Edges,
    Graph,
    Work,
    neighbour_sum,
    two_populations,
)
from moe_ops.zoo.mowst.training import fit

N, CLASSES = 40, 4
has_geometric = importlib.util.find_spec("torch_geometric") is not None
geometric = pytest.mark.skipif(not has_geometric, reason="PyTorch Geometric is not installed")


class Neighbours(nn.Module):
    """A strong expert without PyTorch Geometric: the mean of the neighbours through an MLP.

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

    def at(self, nodes: Tensor, x: Tensor, edges: Edges) -> tuple[Tensor, Work]:
        total = x.shape[0]
        part = edges.into(nodes)
        work = Work(int(nodes.sum()), part.index.shape[1], total, edges.index.shape[1])
        return self(x, part)[nodes], work


def make(**changes) -> Mowst:
    config = MowstConfig(**{"hidden_size": 16, "dropout": 0.0, **changes})
    strong = Neighbours(config.in_size, config.hidden_size, config.num_classes)
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


def random_output(dtype=torch.float64) -> tuple[MowstOutput, Tensor]:
    weak, strong = (3 * torch.randn(N, CLASSES, dtype=dtype) for _ in range(2))
    return MowstOutput(weak, strong, torch.rand(N, dtype=dtype)), torch.randint(CLASSES, (N,))


# ------------------------------------------------------------------- dispersion and confidence


def test_dispersions_are_their_formulas():
    logits = 2 * torch.randn(N, CLASSES, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    variance = ((p - 1 / CLASSES) ** 2).mean(-1)
    one_hot = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    most = ((one_hot - 1 / CLASSES) ** 2).mean()
    entropy = -(p * p.log()).sum(-1)
    d = dispersion(logits)
    torch.testing.assert_close(d[:, 0], variance / most)
    torch.testing.assert_close(d[:, 1], 1 - entropy / math.log(CLASSES))


def test_dispersions_at_their_ends():
    logits = torch.zeros(2, 5, requires_grad=True)
    with torch.no_grad():
        logits[1, 2] = 200.0  # other probabilities round to 0
    d = dispersion(logits)
    torch.testing.assert_close(d, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), atol=1e-6, rtol=0)
    d.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_confidence_is_between_0_and_1_and_learned_where_it_should(kind):
    gate = make_confidence(MowstConfig(confidence=kind))
    for p in gate.parameters():
        nn.init.normal_(p, std=2)
    d = torch.rand(N, 2)
    c = gate(d)
    assert c.shape == (N,) and c.min() >= 0 and c.max() <= 1
    assert bool(list(gate.parameters())) == (kind in ("monotone", "free"))
    if kind in ("variance", "entropy"):
        assert torch.equal(c, d[:, ("variance", "entropy").index(kind)])


@pytest.mark.parametrize("draw", range(3))
def test_monotone_confidence_never_falls_and_is_exact_at_its_ends(draw):
    gate = make_confidence(MowstConfig(confidence="monotone")).double()
    for p in gate.parameters():
        nn.init.normal_(p, std=3)
    low = torch.rand(200, 2, dtype=torch.float64)
    high = low + (1 - low) * torch.rand(200, 2, dtype=torch.float64)
    assert (gate(high) >= gate(low)).all()
    ends = gate(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_detached_dispersion_stops_the_gradient():
    for detach in (False, True):
        model = make(detach_dispersion=detach)
        weak = torch.randn(N, CLASSES, requires_grad=True)
        c = model.confidence(weak)
        assert c.requires_grad  # through the gate, either way
        grad = torch.autograd.grad(c.sum(), weak, allow_unused=True)[0]
        assert (grad is None) == detach


# ------------------------------------------------------------------------------------- losses


def test_losses_are_their_formulas():
    output, labels = random_output()
    p, q = output.weak_logits.softmax(-1), output.strong_logits.softmax(-1)
    rows, c = torch.arange(N), output.confidence
    weak, strong = -p[rows, labels].log(), -q[rows, labels].log()
    torch.testing.assert_close(
        mowst_loss(output, labels, joint=False), (c * weak + (1 - c) * strong).mean()
    )
    mixed = c[:, None] * p + (1 - c[:, None]) * q
    torch.testing.assert_close(output.log_probs().exp(), mixed)
    torch.testing.assert_close(
        mowst_loss(output, labels, joint=True), -mixed[rows, labels].log().mean()
    )


@pytest.mark.parametrize("draw", range(5))
def test_the_joint_loss_is_never_larger(draw):
    output, labels = random_output()
    joint, apart = (mowst_loss(output, labels, joint=joint) for joint in (True, False))
    assert joint <= apart
    # Equal where the experts agree.
    same = MowstOutput(output.weak_logits, output.weak_logits, output.confidence)
    torch.testing.assert_close(
        mowst_loss(same, labels, joint=True), mowst_loss(same, labels, joint=False)
    )


def test_the_joint_loss_is_finite_at_certain_confidence():
    weak, strong = (torch.randn(3, CLASSES, requires_grad=True) for _ in range(2))
    c = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    log_p = mixed_log_probs(weak, strong, c)
    torch.testing.assert_close(log_p[0], strong[0].log_softmax(-1))
    torch.testing.assert_close(log_p[1], weak[1].log_softmax(-1))
    log_p.sum().backward()
    assert all(t.grad.isfinite().all() for t in (weak, strong, c))


def descend(strong_loss: float, labels: Tensor) -> Tensor:
    """Free weak logits of three nodes with one set of features, under Mowst's loss."""
    weak = torch.tensor([0.8, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weak], lr=0.05)
    gate = make_confidence(MowstConfig(num_classes=3, confidence="variance"))
    for _ in range(500):
        c = gate(dispersion(weak[None]))[0]
        own = -weak.log_softmax(-1)[labels].mean()
        loss = c * own + (1 - c) * strong_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate(dispersion(weak[None]))[0].detach()


def test_confidence_vanishes_where_the_strong_expert_is_perfect():
    # Nodes that look alike to the weak expert and have different classes.
    labels = torch.tensor([0, 0, 1])
    assert descend(0.0, labels) < 1e-3
    # And it stays where the strong one is worse than guessing from features.
    assert descend(3.0, labels) > 0.2


def test_expected_accuracy_is_the_mean_over_draws():
    output, labels = random_output()
    weak, strong = (t.argmax(-1) == labels for t in output[:2])
    draws = torch.rand(20000, N, dtype=torch.float64) < output.confidence
    simulated = torch.where(draws, weak, strong).double().mean()
    exact = expected_accuracy(output, labels, mode="stochastic")
    assert abs(exact - simulated) < 4 * 0.5 / math.sqrt(20000 * N)
    mixed = output.log_probs().argmax(-1) == labels
    assert expected_accuracy(output, labels, mode="mixed") == mixed.double().mean()


# ------------------------------------------------------------------------------------ prediction


def test_mixed_prediction_is_the_mixture():
    model, graph = make().eval(), random_graph()
    edges = model.strong.prepare(graph.edge_index, N)
    prediction = model.predict(graph.x, graph.edge_index)
    torch.testing.assert_close(prediction.probs, model(graph.x, edges).log_probs().exp())
    assert prediction.used_strong.all() and prediction.work.saved == 0


def test_a_threshold_bounds_the_error():
    model, graph = make(confidence="free"), random_graph()
    model.train()
    exact = model.predict(graph.x, graph.edge_index)
    threshold = float(exact.confidence.median())
    fewer = model.predict(graph.x, graph.edge_index, threshold=threshold)
    assert torch.equal(fewer.used_strong, exact.confidence < threshold)
    assert 0.3 < fewer.used_strong.float().mean() < 0.7
    gap = (fewer.probs - exact.probs).abs().sum(-1) / 2
    assert (gap <= 1 - threshold + 1e-6).all()
    torch.testing.assert_close(fewer.probs[fewer.used_strong], exact.probs[fewer.used_strong])
    assert fewer.work.saved > 0.2
    assert model.training


def test_stochastic_prediction_draws_by_confidence():
    model, graph = make(confidence="free", joint=False).eval(), random_graph()
    edges = model.strong.prepare(graph.edge_index, N)
    output = model(graph.x, edges)
    uses = torch.zeros(N)
    for i in range(400):
        generator = torch.Generator().manual_seed(i)
        prediction = model.predict(graph.x, graph.edge_index, generator=generator)
        used = prediction.used_strong
        uses += used
        expected = torch.where(used[:, None], output.strong_logits, output.weak_logits).softmax(-1)
        torch.testing.assert_close(prediction.probs, expected)
    torch.testing.assert_close(uses / 400, 1 - output.confidence.detach(), atol=0.12, rtol=0)
    again = model.predict(graph.x, graph.edge_index, generator=generator.manual_seed(399))
    assert torch.equal(again.probs, prediction.probs)


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("warm_up", ["none", "weak", "strong", "both"])
def test_fit_lowers_the_validation_loss(joint, warm_up):
    model, graph = make(joint=joint), random_graph()
    edges = model.strong.prepare(graph.edge_index, N)

    def loss() -> float:
        output = MowstOutput(*(t[graph.valid] for t in model.eval()(graph.x, edges)))
        return mowst_loss(output, graph.y[graph.valid], joint=joint).item()

    before = loss()
    history = fit(model, graph, warm_up=warm_up, epochs=12, patience=4, rounds=3, progress=False)
    names = {"none": [], "both": ["warm-up weak", "warm-up strong"]}
    expected = names.get(warm_up, [f"warm-up {warm_up}"])
    assert history.stages[: len(expected)] == expected
    rest = history.stages[len(expected) :]
    assert rest == ["joint"] if joint else rest[:2] == ["round 0 weak", "round 0 strong"]
    falling = history.valid_loss[len(expected) :]
    assert falling == sorted(falling, reverse=True)
    assert loss() == pytest.approx(falling[-1], rel=1e-5)
    if warm_up == "none":
        assert loss() <= before


def test_a_turn_leaves_the_other_part_alone(monkeypatch):
    import moe_ops.zoo.mowst.training as training

    model, inner = make(joint=False, confidence="free"), training._train
    graph, _ = two_populations(300, generator=torch.Generator().manual_seed(2))

    def watched(name, parts, *args, **kwargs):
        frozen = [m for m in (model.weak, model.strong, model.gate) if m not in parts]
        before = [{k: v.clone() for k, v in m.state_dict().items()} for m in frozen]
        assert not any(m.training for m in frozen)
        result = inner(name, parts, *args, **kwargs)
        for module, state in zip(frozen, before, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        return result

    monkeypatch.setattr(training, "_train", watched)
    history = fit(model, graph, epochs=8, patience=8, rounds=2, progress=False)
    assert len(history.stages) == 4
    assert model.gate.net[1].num_batches_tracked > 0


def test_fit_is_deterministic():
    graph = random_graph()
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        model = make(joint=False, dropout=0.3)
        fit(model, graph, epochs=5, rounds=2, progress=False)
        results.append(model.predict(graph.x, graph.edge_index, mode="mixed").probs)
    assert torch.equal(*results)


def test_the_two_populations_are_what_they_say():
    graph, featured = two_populations(2000, generator=torch.Generator().manual_seed(0))
    source, target = graph.edge_index
    assert torch.equal(featured[source], featured[target])  # not linked
    same = (graph.y[source] == graph.y[target]).float()
    assert same[featured[source]].mean() == pytest.approx(0.25, abs=0.03)
    assert same[~featured[source]].mean() == pytest.approx(5 / 6 + 0.25 / 6, abs=0.03)
    back = torch.stack([target, source]).unique(dim=1)
    assert torch.equal(back, graph.edge_index)
    assert graph.train.float().mean() == pytest.approx(0.4, abs=0.04)
    assert not (graph.train & graph.valid).any() and (graph.train | graph.valid | graph.test).all()


def test_experts_find_their_population():
    generator = torch.Generator().manual_seed(3)
    # One hop of averaging only, so structure nodes need a little more to average than by default.
    graph, featured = two_populations(1200, signal=3.0, weak_signal=0.8, generator=generator)
    model = make(confidence="monotone")
    fit(model, graph, epochs=100, patience=30, lr=2e-2, progress=False)
    model.eval()
    output = model(graph.x, model.strong.prepare(graph.edge_index, 1200))
    c = output.confidence
    assert c[featured].mean() > c[~featured].mean() + 0.2
    mixed, weak, strong = (
        (t.argmax(-1) == graph.y)[graph.test].float().mean()
        for t in (output.log_probs(), output.weak_logits, output.strong_logits)
    )
    assert mixed > max(weak, strong) + 0.1


# ----------------------------------------------------------------------- PyTorch Geometric


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
        part, work = net.at(nodes, graph.x, edges)
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


def test_neighbour_sum_is_its_formula():
    # Node 3 is no target, node 2 no source; one edge is there twice.
    target = torch.tensor([0, 0, 1, 1, 1, 2])
    source = torch.tensor([1, 3, 0, 0, 4, 3])
    weight = torch.rand(6, dtype=torch.float64)
    edges = Edges(torch.stack([source, target]), weight)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix.index_put_((target, source), weight, accumulate=True)
    torch.testing.assert_close(neighbour_sum(x, edges), matrix @ x)
    assert torch.autograd.gradcheck(lambda t: neighbour_sum(t, edges), x)


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
def test_a_node_pays_for_its_neighbourhood_and_no_more(backbone):
    # A path 0 -> 1 -> ... -> 9. Node 5 after two layers needs 4 and 5 after one, and 3, 4 and 5.
    edge_index = torch.stack([torch.arange(9), torch.arange(1, 10)])
    net = GNN(backbone, 16, 8, CLASSES, 2, 0.0).eval()
    x, nodes = torch.randn(10, 16), torch.arange(10) == 5
    edges = net.prepare(edge_index, 10)
    expected = net(x, edges)[nodes]
    x[:3], x[6:] = math.nan, math.nan
    found, work = net.at(nodes, x, edges)
    torch.testing.assert_close(found, expected)
    loops = backbone == "gcn"
    assert work.layers == [(3, 2 + 2 * loops), (2, 1 + loops)]


@geometric
def test_prediction_pays_for_the_nodes_that_need_it():
    # Two paths without a link; the weak expert is sure of the first.
    first = torch.stack([torch.arange(9), torch.arange(1, 10)])
    model = Mowst(MowstConfig(hidden_size=8, confidence="variance", dropout=0.0)).eval()
    logits = torch.zeros(20, CLASSES)
    logits[:10, 1] = 40.0
    model.weak = nn.Linear(16, CLASSES)
    nn.init.zeros_(model.weak.bias)
    with torch.no_grad():
        model.weak.weight.copy_(torch.eye(CLASSES, 16))
    x = torch.randn(20, 16)
    x[:, :CLASSES] = logits
    asked = []
    model.strong.convs[0].lin.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    prediction = model.predict(x, torch.cat([first, first + 10], dim=1), threshold=0.9)
    assert torch.equal(prediction.used_strong, torch.arange(20) >= 10)
    assert asked == [10] and prediction.work.layers == [(10, 19), (10, 19)]
    assert prediction.work.saved == 0.5
    # Where uniform predictions have C = 0 and certain ones 1, no draw changes that.
    drawn = model.predict(x, torch.cat([first, first + 10], dim=1), mode="stochastic")
    assert torch.equal(drawn.used_strong, prediction.used_strong) and asked == [10, 10]


@geometric
@pytest.mark.parametrize("backbone", BACKBONES)
def test_whole_models_train_and_predict(backbone):
    graph, _ = two_populations(300, generator=torch.Generator().manual_seed(1))
    model = Mowst(MowstConfig(backbone=backbone, hidden_size=8, dropout=0.0))
    fit(model, graph, epochs=5, progress=False)
    prediction = model.predict(graph.x, graph.edge_index)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(300))
    exact = model.eval()(graph.x, model.strong.prepare(graph.edge_index, 300))
    torch.testing.assert_close(prediction.probs, exact.log_probs().exp(), atol=1e-5, rtol=1e-4)


def test_without_geometric_one_sentence_says_what_to_install(monkeypatch):
    for name in ("torch_geometric", "torch_geometric.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install torch-moe-ops\[graphs\]"):
        Mowst(MowstConfig())


def test_bad_configs_and_calls(bad_input):
    with bad_input("MowstConfig", "confidence", "'sure'"):
        MowstConfig(confidence="sure")
    with bad_input("MowstConfig", "num_classes", "1"):
        MowstConfig(num_classes=1)
    with bad_input("GNN", "backbone", "'gpt'"):
        GNN("gpt", 4, 4, 4, 2, 0.0)
    graph = random_graph()
    with bad_input("fit", "warm_up", "'hot'"):
        fit(make(), graph, warm_up="hot", progress=False)
    with bad_input("Mowst", "mode", "best"):
        make().predict(graph.x, graph.edge_index, mode="best")
    with bad_input("Graph", "edge_index", "40"):
        Graph(graph.x, torch.tensor([[0], [40]]), *([graph.y] + [graph.train] * 3))
    graph.valid[:] = False
    with bad_input("fit", "valid", "none"):
        fit(make(), graph, progress=False)
