"""Traces, the predictor of routes, and batches split by them."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_ops import zoo
from moe_ops.offload import (
    ExpertPredictor,
    ExpertTrace,
    PredictivePolicy,
    generate_in_halves,
    offload_experts,
    record_expert_trace,
    split_batch_by_experts,
    train_predictor,
)
from moe_ops.offload.schedule import num_active

V = 12


def toy_trace() -> ExpertTrace:
    """Experts by the token (call 0) and by the token before (call 1): E = 4."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (16, 24), generator=generator)
    before = tokens.roll(1, 1)
    before[:, 0] = 0
    ids = torch.stack((tokens % 4, before % 4), -1).to(torch.int16)
    steps = torch.tensor([[16, 24]])
    return ExpertTrace(ids.flatten(0, 1)[..., None], tokens.flatten(), steps, [0, 1], 4)


def test_trace(tmp_path):
    torch.manual_seed(0)
    model = zoo.create_model("deepseek", preset="tiny", num_layers=3).eval()
    prompt = torch.randint(256, (2, 5))
    with record_expert_trace(model) as recorder:
        out = model.generate(prompt, 4)
    trace = recorder.trace()
    assert trace.steps.tolist() == [[2, 5], [2, 1], [2, 1], [2, 1]]
    assert [trace.tokens[rows].tolist() for rows in trace.sequences()] == out[:, :-1].tolist()
    calls = trace.calls()
    assert [bank for bank, _ in calls] == [0, 1] * 4
    used = trace.ids[:10, 1].unique().tolist()
    assert calls[1] == (1, used)
    hot = trace.multi_hot()
    assert hot.shape == (16, 2, 16) and bool((hot.sum(-1) == model.config.top_k).all())
    trace.save(tmp_path / "trace.npz")
    again = ExpertTrace.load(tmp_path / "trace.npz")
    assert torch.equal(again.ids, trace.ids) and again.calls() == calls
    assert again.banks == trace.banks and again.num_experts == 16
    (tmp_path / "other.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="must be a saved trace"):
        ExpertTrace.load(tmp_path / "other.npz")


def test_predictor_learns_and_streams(tmp_path):
    trace = toy_trace()
    predictor = train_predictor(
        trace, V, steps=300, learning_rate=1e-2, width=32, num_layers=1, window=16
    )
    tokens = trace.tokens.view(16, 24)[:2, :16]
    want = trace.multi_hot().view(16, 24, 2, 4)[:2, :16]
    chances = predictor.chances(tokens)
    assert ((chances > 0.5) == want)[:, 1:].float().mean() > 0.95
    stream = predictor.stream()
    first = stream(tokens[:, :5])
    torch.testing.assert_close(first, 1 - (1 - chances[:, :5]).flatten(0, 1).prod(0))
    torch.testing.assert_close(stream(tokens[:, 5:6]), 1 - (1 - chances[:, 5]).prod(0))
    predictor.save(tmp_path / "predictor.pt")
    again = ExpertPredictor.load(tmp_path / "predictor.pt")
    torch.testing.assert_close(again.chances(tokens), chances)
    with pytest.raises(ValueError, match="at most 16 in a row, got 17"):
        predictor(torch.zeros(1, 17).long())


def test_training_needs_known_tokens():
    trace = toy_trace()
    trace.tokens[:] = -1
    with pytest.raises(ValueError, match="tokens that are not known"):
        train_predictor(trace, V)


def test_predicted_policy_generates_the_same():
    torch.manual_seed(0)
    model = zoo.create_model("deepseek", preset="tiny", num_layers=3).eval()
    prompt = torch.randint(256, (2, 5))
    with record_expert_trace(model) as recorder:
        want = model.generate(prompt, 6)
    predictor = train_predictor(recorder.trace(), 256, steps=5, width=16, num_layers=1)
    with offload_experts(model, 10, policy=PredictivePolicy(predictor.stream())) as cache:
        assert torch.equal(model.generate(prompt, 6), want)
        assert cache.stats.predict_seconds > 0


def test_split_batch():
    """Sequences of two kinds are told apart; small batches are split as well as can be."""
    generator = torch.Generator().manual_seed(0)
    routes = torch.zeros(8, 2, 6, dtype=torch.bool)
    routes[::2, :, :3] = torch.rand(4, 2, 3, generator=generator) > 0.3
    routes[1::2, :, 3:] = torch.rand(4, 2, 3, generator=generator) > 0.3
    left, right = split_batch_by_experts(routes)
    assert sorted((left.tolist(), right.tolist())) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    total = best_total = 0
    for seed in range(5):
        generator.manual_seed(seed)
        routes = torch.rand(7, 2, 8, generator=generator) > 0.7
        left, right = split_batch_by_experts(routes)
        assert sorted(left.tolist() + right.tolist()) == list(range(7)) and len(left) == 4
        total += num_active(routes[left]) + num_active(routes[right])
        rest = [
            (list(four), [i for i in range(7) if i not in four])
            for four in itertools.combinations(range(7), 4)
        ]
        best_total += min(num_active(routes[a]) + num_active(routes[b]) for a, b in rest)
    assert total <= 1.05 * best_total
    with pytest.raises(ValueError, match="of two sequences at least"):
        split_batch_by_experts(routes[:1])


def test_generate_in_halves():
    torch.manual_seed(0)
    model = zoo.create_model("deepseek", preset="tiny").eval()
    prompts = torch.randint(256, (5, 4))
    predictor = ExpertPredictor(256, 1, 16, width=16, num_layers=1).eval()
    got = generate_in_halves(model, prompts, 5, predictor)
    assert torch.equal(got, model.generate(prompts, 5))
