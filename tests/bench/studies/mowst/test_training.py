"""Training of Mowst, and the graph that needs both experts."""

from __future__ import annotations

import pytest
import torch
from bench.studies.mowst.graphs import two_populations
from bench.studies.mowst.training import fit
from tests.zoo.mowst.common import N, geometric, make, random_graph

from moe_ops.zoo.mowst import Mowst, MowstConfig, MowstOutput, mowst_loss
from moe_ops.zoo.mowst.graphs import BACKBONES


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
    from bench.studies.mowst import training

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
    assert float(same[featured[source]].mean()) == pytest.approx(0.25, abs=0.03)
    assert float(same[~featured[source]].mean()) == pytest.approx(5 / 6 + 0.25 / 6, abs=0.03)
    back = torch.stack([target, source]).unique(dim=1)
    assert torch.equal(back, graph.edge_index)
    assert float(graph.train.float().mean()) == pytest.approx(0.4, abs=0.04)
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
