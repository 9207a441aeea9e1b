"""Recipes that change how a network is trained: each against its equation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bench.studies.recipes import (
    boosting,
    counter_current,
    forward_gnn,
    gradient_noise,
    guidance,
    long_tail,
    look,
    ranking_curriculum,
    talking_models,
)
from tests.helpers.moe import build_moe
from torch import nn


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


class Experts(nn.Module):
    """A block with routed experts, as any block of a model."""

    def __init__(self, size):
        super().__init__()
        self.moe = build_moe(size, 8, num_experts=4, top_k=2)

    def forward(self, x):
        return self.moe(x)


# ---------------------------------------------------------------------------------- gradient noise


def test_gradient_noise_has_the_published_variance():
    p, q = nn.Parameter(torch.zeros(20_000)), nn.Parameter(torch.zeros(3))
    noise = gradient_noise.GradientNoise([p, q], eta=0.3, generator=drawn())
    for t in range(4):
        assert noise.deviation == pytest.approx(math.sqrt(0.3 / (1 + t) ** 0.55))
        p.grad = torch.full_like(p, 2.0)
        noise.add()
        assert float(p.grad.mean()) == pytest.approx(2, abs=4 * noise.deviation / 100)
        assert float(p.grad.var()) == pytest.approx(0.3 / (1 + t) ** 0.55, rel=0.05)
    assert q.grad is None
    same = gradient_noise.GradientNoise([p], eta=0.3, generator=drawn(5))
    same.load_state_dict(noise.state_dict())
    p.grad = torch.zeros_like(p)
    same.add()
    wanted = torch.empty_like(p).normal_(generator=drawn(5)) * math.sqrt(0.3 / 5**0.55)
    torch.testing.assert_close(p.grad, wanted.detach())
    with pytest.raises(ValueError, match="at least 0, got -1"):
        gradient_noise.GradientNoise([p], eta=-1)


# --------------------------------------------------------------------------------- counter-current


def test_counter_current_gradients_stay_in_their_layer():
    torch.manual_seed(0)
    net = counter_current.CounterCurrent.mlp([6, 5, 4], 3)
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    losses = net.losses(x, y)
    a1 = F.elu(x @ net.blocks[0][0].weight.T)
    s2 = F.elu(torch.eye(3) @ net.feedback[0][0].weight.T)
    s1 = F.elu(s2 @ net.feedback[1][0].weight.T)
    wanted = torch.zeros(7, 3)
    wanted[torch.arange(7), y] = 1
    error = (a1 @ s1.T - wanted).square().mean()
    torch.testing.assert_close(losses[0], error / 5 * 0.5 * 256)
    torch.testing.assert_close(losses[-1], F.cross_entropy(net(x), y))
    sum(losses).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in net.parameters())
    every = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.losses(x, y)[0].backward()
    touched = [n for n, p in net.named_parameters() if p.grad is not None]
    assert touched == ["blocks.0.0.weight", "feedback.1.0.weight"]
    # The sum's gradient is each loss's own.
    for loss in net.losses(x, y)[1:]:
        loss.backward()
    for wanted, p in zip(every, net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted)


def test_counter_current_takes_experts_and_learns():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.ELU()), Experts(8), nn.Linear(8, 2)]
    feedback = [nn.Linear(2, 8), nn.Linear(8, 8)]
    net = counter_current.CounterCurrent(blocks, feedback, 2, scale=8.0)
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    before = net.alignment(x, y)
    for _ in range(80):
        optimizer.zero_grad()
        sum(net.losses(x, y)).backward()
        optimizer.step()
    assert float((net(x).argmax(1) == y).double().mean()) > 0.9
    assert net.alignment(x, y)[0] > before[0]
    with pytest.raises(ValueError, match="feedback must have 2 blocks, got 1"):
        counter_current.CounterCurrent(blocks, feedback[:1], 2)


# ---------------------------------------------------------------------------------------- guidance


def test_linear_cka():
    x, y = torch.randn(9, 2, 3, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    center = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(a, b):
        a, b = a.flatten(1), b.flatten(1)
        return (center @ a @ a.T @ center * (center @ b @ b.T @ center)).sum()

    wanted = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    torch.testing.assert_close(guidance.linear_cka(x, y), wanted)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    same = guidance.linear_cka(x, 3 * x.flatten(1) @ turn + 1)
    assert float(same) == pytest.approx(1)
    flat = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
    value = guidance.linear_cka(flat, x)
    value.backward()
    assert float(value.detach()) == 0 and bool(flat.grad.isfinite().all())


def test_guided():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Experts(6), nn.Linear(6, 3))
    guide = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    x = torch.randn(8, 4)
    output, away = guidance.guided(model, guide, x, ["0", "1"], ["0", "2"])
    assert torch.equal(output, model(x)) and guide.training
    h, hidden = guide[0](x), model[0](x)
    wanted = 2 - guidance.linear_cka(hidden, h) - guidance.linear_cka(model[1](hidden), guide[2](h))
    torch.testing.assert_close(away, wanted)
    away.backward()
    assert model[0].weight.grad.abs().sum() > 0 and guide[0].weight.grad is None
    assert guidance.matching_layers(20, 4) == [0, 6, 13, 19]
    assert guidance.matching_layers(5, 1) == [4]
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        guidance.guided(model, guide, x, ["0"], ["0", "2"])
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[0](x))
    with pytest.raises(ValueError, match="got 1 that did not"):
        guidance.guided(model, guide, x, ["1"], ["0"])


# -------------------------------------------------------------------------------------------- LOOK


def test_look_loss_is_that_of_a_loop():
    z = torch.randn(6, 4, generator=drawn(1)).requires_grad_()
    memory, y = torch.randn(9, 4, generator=drawn(2)), torch.tensor([0, 1, 2, 0, 1, 3])
    memory[:6] = z.detach()
    memory_y = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 2])
    own = torch.tensor([0, 1, 2, 3, 4, 5])
    loss = look.look_loss(z, y, memory, memory_y, 3, temperature=0.5, own=own)
    wanted, alone = [], 0
    for i in range(6):
        others = [j for j in range(9) if j != i]
        cosine = F.cosine_similarity(z[i : i + 1], memory)
        order = sorted(others, key=lambda j: -float(cosine[j].detach()))
        near = order[:3]
        if not any(memory_y[j] == y[i] for j in near):
            same = [j for j in order if memory_y[j] == y[i]]
            alone += 1
            if not same:
                continue  # Class 3 has no other example.
            near = [*near, same[0]]
        every = sum((cosine[j] / 0.5).exp() for j in near)
        right = sum((cosine[j] / 0.5).exp() for j in near if memory_y[j] == y[i])
        wanted.append(-(right / every).log())
    assert alone >= 2 and len(wanted) == 5
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    assert bool(z.grad.isfinite().all()) and bool(z.grad[:5].abs().sum() > 0)
    nothing = look.look_loss(z, torch.full((6,), 8), memory, memory_y, 3)
    assert float(nothing.detach()) == 0
    everyone = look.look_loss(z, y, memory, memory_y, 100, own=own)
    assert bool(everyone.isfinite())


def test_memory_and_momentum_encoder():
    memory = look.Memory(3, 2)
    for i in range(4):
        memory.push(torch.full((1, 2), float(i)), torch.tensor([i]))
    assert memory.y.tolist() == [1, 2, 3] and memory.z[:, 0].tolist() == [1, 2, 3]
    slow, fast = nn.Linear(2, 1), nn.Linear(2, 1)
    wanted = 0.9 * slow.weight + 0.1 * fast.weight
    look.follow(slow, fast, 0.1)
    torch.testing.assert_close(slow.weight, wanted)


# ---------------------------------------------------------------------------------------- curricula


def test_curriculum_weights():
    rc = ranking_curriculum
    assert rc.reciprocal_rank(torch.tensor([1, 4])).tolist() == [1, 0.25]
    scores = torch.tensor([[2.0, 6.0, 4.0], [1.0, 1.0, 1.0]])
    assert rc.normalized_score(scores).tolist() == [[0, 1, 0.5], [0.5, 0.5, 0.5]]
    seeming = torch.tensor([0.8, 0.3])
    easy = rc.pointwise_easiness(seeming, torch.tensor([1, 0]))
    torch.testing.assert_close(easy, torch.tensor([0.8, 0.7]))
    pair = rc.pairwise_easiness(torch.tensor(0.9), torch.tensor(0.2))
    assert float(pair) == pytest.approx(0.85)
    for epoch, wanted in ((0, 0.85), (5, 0.85 * 0.75 + 0.25), (20, 1.0), (30, 1.0)):
        assert float(rc.curriculum_weight(pair, epoch, 20)) == pytest.approx(wanted)
    assert float(rc.curriculum_weight(pair, 0, 20, anti=True)) == pytest.approx(0.15)
    sample = torch.randn(400, generator=drawn())
    share = rc.score_distribution(torch.tensor([-50.0, 0.0, 50.0]), sample)
    assert share[0] == 0 and share[2] == 1 and 0.4 < float(share[1]) < 0.6


def test_ranking_losses_weigh_each_pair():
    rc = ranking_curriculum
    good, bad = torch.randn(5, generator=drawn(1)), torch.randn(5, generator=drawn(2))
    weight = torch.rand(5, generator=drawn(3))
    both = torch.stack([good, bad], 1).log_softmax(1)[:, 0]
    torch.testing.assert_close(rc.pairwise_loss(good, bad, weight), -(weight * both).mean())
    assert not torch.isclose(rc.pairwise_loss(good, bad, weight), -both.mean() * weight.mean())
    torch.testing.assert_close(rc.pairwise_loss(good, bad), -both.mean())
    y = torch.tensor([1, 0, 1, 0, 1])
    p = good.sigmoid()
    wanted = -(weight * torch.where(y == 1, p, 1 - p).log()).mean()
    torch.testing.assert_close(rc.pointwise_loss(good, y, weight), wanted)


# ---------------------------------------------------------------------------------------- boosting


@pytest.mark.parametrize("loss", boosting.LOSSES)
def test_boosting(loss):
    x = torch.randn(80, 3, generator=drawn(1))
    y = x[:, 0] * x[:, 1]
    y = {"squared": y, "logistic": (y > 0).long(), "softmax": (y > 0).long() + (x[:, 2] > 1)}[loss]
    outputs = 3 if loss == "softmax" else 1
    net = boosting.BoostedNetwork(loss, 3, outputs, units=2, subsample=1.0)
    start = float(net.mean_loss(net.start.expand(80, -1), y))
    history = net.fit(x, y, 4, iterations=10)
    assert all(b < a for a, b in zip([start, *history], history, strict=False))
    # One wide network is the sum of the stages, all or some.
    torch.testing.assert_close(net.merged()(x), net(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.merged(2)(x), net(x, 2), rtol=1e-5, atol=1e-5)
    assert net.merged()[0].out_features == 8
    # The last stage: residuals are minus the gradient, and the step is Newton's along it.
    before = net(x, 3).double()
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    f = net.stages[3](x).double().detach()
    before.requires_grad_()
    total = net.mean_loss(before, y) * 80
    (gradient,) = torch.autograd.grad(total, before)
    torch.testing.assert_close(net._residual(before, y), -gradient, atol=1e-6, rtol=1e-5)
    along = net.mean_loss(before.detach() + step * f, y)
    (first,) = torch.autograd.grad(along, step, create_graph=True)
    (second,) = torch.autograd.grad(first, step)
    assert net.steps[3] == pytest.approx(-float(first.detach() / second), rel=1e-4)


def test_boosting_starts_at_the_best_constant():
    y = torch.tensor([0, 1, 1, 1])
    net = boosting.BoostedNetwork("logistic", 2)
    net.fit(torch.randn(4, 2), y, 1, iterations=1)
    assert float((2 * net.start).sigmoid()) == pytest.approx(0.75)
    mean = boosting.BoostedNetwork("squared", 2, 2)
    mean.fit(torch.randn(2, 2), torch.tensor([[1.0, 2.0], [3.0, 2.0]]), 1, iterations=1)
    assert mean.start.tolist() == [2, 2]
    with pytest.raises(ValueError, match="units must be at least 1"):
        boosting.BoostedNetwork("squared", 2, units=0)


# -------------------------------------------------------------------------------------- ForwardGNN


def two_blobs(generator):
    y = torch.arange(40) % 2
    x = torch.randn(40, 5, generator=generator) + (2.0 * y[:, None] - 1)
    pairs = torch.randint(40, (2, 160), generator=generator)
    return x, pairs[:, y[pairs[0]] == y[pairs[1]]], y


def test_class_nodes_touch_training_nodes_alone():
    x, edges, y = two_blobs(drawn())
    train = torch.arange(40) < 12
    graph = forward_gnn.with_class_nodes(x, edges, y, train, 2, drawn(1))
    added = graph.edge_index[:, edges.shape[1] :]
    assert added.shape[1] == 24 and graph.x.shape == (42, 5)
    for a, b in added.T.tolist():
        node, of_class = min(a, b), max(a, b)
        assert node < 12 and of_class == 40 + int(y[node])
    one_way = forward_gnn.with_class_nodes(x, edges, y, train, 2, drawn(1), both_ways=False)
    assert torch.equal(one_way.edge_index, graph.edge_index[:, :-12])
    assert torch.equal(one_way.x, graph.x)


def test_forward_gnn():
    torch.manual_seed(0)
    x, edges, y = two_blobs(drawn())
    train, valid = torch.arange(40) < 12, (torch.arange(40) >= 12) & (torch.arange(40) < 20)
    graph = forward_gnn.with_class_nodes(x, edges, y, train, 2, drawn(1), both_ways=False)
    net = forward_gnn.ForwardGNN([forward_gnn.MeanConv(5, 6), forward_gnn.MeanConv(6, 6)], 0.5)
    first = F.normalize(graph.x, dim=1)
    mean = torch.stack([
        first[edges_to].mean(0) if len(edges_to) else torch.zeros(5)
        for edges_to in ([int(a) for a, b in graph.edge_index.T if b == i] for i in range(42))
    ])  # fmt: skip
    layer = net.layers[0]
    h = torch.relu(layer.own(first) + mean @ layer.others.weight.T)
    got, scores = net.layer_scores(layer, graph.x, graph)
    torch.testing.assert_close(got, h)
    torch.testing.assert_close(scores, h[:40] @ h[40:].T / 0.5)
    history = net.fit(graph, y, train, valid, steps=60, rate=0.02)
    assert len(history) == 2 and history[0][-1] < history[0][0]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())
    out = net(graph)
    below, s1 = net.layer_scores(net.layers[0], graph.x, graph)
    torch.testing.assert_close(
        out, s1.softmax(1) + net.layer_scores(net.layers[1], below, graph)[1].softmax(1)
    )
    assert float((out[20:].argmax(1) == y[20:]).double().mean()) > 0.8


# ---------------------------------------------------------------------------------- talking models


def test_conversation():
    torch.manual_seed(0)
    talk = talking_models.Conversation(4, 6, 3)
    s, s_up, t = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 6)
    top = nn.Linear(6, 6)
    upper = lambda h: torch.tanh(top(h))  # noqa: E731
    said = talk.student_encoder(s)
    heard = talk.student_decoder(talk.teacher_encoder(upper(talk.teacher_decoder(said))))
    found = talk.losses(s, s_up, t, upper)
    torch.testing.assert_close(found["interact"], (s_up - heard).square().mean())
    torch.testing.assert_close(found["message"], (said - talk.teacher_encoder(t)).square().mean())
    own = (talk.student_decoder(said) - s).square().mean()
    own = own + (talk.teacher_decoder(talk.teacher_encoder(t)) - t).square().mean()
    torch.testing.assert_close(found["state"], own)
    told = talk.understood(heard, t, upper)
    torch.testing.assert_close(talk.understood(s, t, upper, rounds=2), told)
    one_way = talk.student_decoder(talk.teacher_encoder(upper(t)))
    torch.testing.assert_close(talk.understood(s, t, upper, interactive=False), one_way)
    total = talking_models.mix(found, {"interact": 1.0, "state": 0.5})
    torch.testing.assert_close(total, found["interact"] + 0.5 * own)
    assert float(talking_models.mix(found, {})) == 0


# --------------------------------------------------------------------------------------- long tail


def test_long_tail_parts():
    assert long_tail.long_tailed_counts(3, 100, 100) == [100, 10, 1]
    y = torch.tensor([0] * 8 + [1] * 5 + [2])
    rows = long_tail.long_tailed(y, [4, 2, 3], drawn())
    assert y[rows].bincount().tolist() == [4, 2, 1] and len(rows.unique()) == 7
    logits = torch.randn(14, 3, generator=drawn())
    prior = torch.tensor([0.5, 0.3, 0.2])
    wanted = -(logits.exp() * prior / (logits.exp() * prior).sum(1, keepdim=True)).log()
    got = long_tail.adjusted_cross_entropy(logits, y, [50, 30, 20])
    torch.testing.assert_close(got, wanted[torch.arange(14), y].mean())
    groups = long_tail.groups_of([5, 9, 9, 1])
    assert {n: c.tolist() for n, c in groups.items()} == {"many": [1, 2], "medium": [0], "few": [3]}
    three = long_tail.groups_of([8, 5, 1])
    right = F.one_hot(torch.where(y == 2, 0, y), 3).float()
    found = long_tail.accuracy_by_group(right, y, three)
    assert found == {"many": 1, "medium": 1, "few": 0, "all": pytest.approx(2 / 3)}
    models = [nn.Linear(2, 3) for _ in range(3)]
    x = torch.randn(4, 2)
    torch.testing.assert_close(long_tail.summed_logits(models, x), sum(m(x) for m in models))


def test_long_tail_bench_runs():
    generator = drawn()
    y = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator) + 3 * F.one_hot(y, 4)
    found = long_tail.run_bench(
        lambda: nn.Linear(4, 3), (x, y), (x, y), (x, y),
        pretrained_on=[[9, 3, 1], [1, 9, 3]], counts=[20, 5, 1], pretrain_steps=4, steps=4,
    )  # fmt: skip
    assert list(found) == ["fine-tuned alone", "adjusted", "sum, one pre-training",
                           "sum, different pre-training"]  # fmt: skip
    for row in found.values():
        assert set(row) == {"many", "medium", "few", "all", "missing upstream"}
        assert all(0 <= value <= 1 for value in row.values())
