"""Mowst's confidence, losses and predictions against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.mowst.graphs import Graph
from bench.studies.mowst.training import fit
from bench.studies.mowst.work import work_of
from torch import Tensor, nn

from moe_ops.zoo.mowst import Mowst, MowstConfig, MowstOutput, dispersion, mowst_loss
from moe_ops.zoo.mowst.graphs import GNN
from moe_ops.zoo.mowst.model import CONFIDENCES, make_confidence

from .common import CLASSES, N, geometric, make, random_graph


def random_output(dtype=torch.float64) -> tuple[MowstOutput, Tensor]:
    weak, strong = (3 * torch.randn(N, CLASSES, dtype=dtype) for _ in range(2))
    return MowstOutput(weak, strong, torch.rand(N, dtype=dtype)), torch.randint(CLASSES, (N,))


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
    log_p = MowstOutput(weak, strong, c).log_probs()
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


def test_mixed_prediction_is_the_mixture():
    model, graph = make().eval(), random_graph()
    edges = model.strong.prepare(graph.edge_index, N)
    prediction = model.predict(graph.x, graph.edge_index)
    torch.testing.assert_close(prediction.probs, model(graph.x, edges).log_probs().exp())
    assert prediction.used_strong.all()


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
    assert asked == [10]
    edges = model.strong.prepare(torch.cat([first, first + 10], dim=1), 20)
    work = work_of(model.strong, prediction.used_strong, edges)
    assert work.layers == [(10, 19), (10, 19)] and work.saved == 0.5
    # Where uniform predictions have C = 0 and certain ones 1, no draw changes that.
    drawn = model.predict(x, torch.cat([first, first + 10], dim=1), mode="stochastic")
    assert torch.equal(drawn.used_strong, prediction.used_strong) and asked == [10, 10]


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
