"""Loss, metrics and training of the multi-task models."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from bench.studies.home.models import build
from bench.studies.home.training import Rows, auc, evaluate, fit, gauc, predict
from tests.zoo.home.common import CONFIG, T, batch, make

from moe_ops.zoo.home import multitask_loss


def test_loss_is_the_sum_of_means_over_known_labels():
    logits = torch.randn(T, 2, dtype=torch.float64)
    labels = torch.randint(2, (T, 2)).double()
    labels[:4, 1] = math.nan
    p = logits.sigmoid()
    each = -(labels * p.log() + (1 - labels) * (1 - p).log())
    expected = each[:, 0].mean() + each[4:, 1].mean()
    torch.testing.assert_close(multitask_loss(logits, labels), expected)
    nothing = multitask_loss(logits, torch.full_like(labels, math.nan))
    assert nothing == 0


def slow_auc(scores, labels) -> float:
    pairs = [
        (float(p > n) + 0.5 * float(p == n))
        for p, y in zip(scores.tolist(), labels.tolist(), strict=True)
        if y == 1
        for n, y2 in zip(scores.tolist(), labels.tolist(), strict=True)
        if y2 == 0
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


def test_auc_and_gauc_count_pairs():
    scores = torch.randint(6, (90,)).double()  # many ties
    labels = (torch.rand(90) < 0.3).double()
    users = torch.randint(12, (90,)) * 1000
    users[:5] = 7
    labels[:5] = 1  # a user with one class
    assert auc(scores, labels) == pytest.approx(slow_auc(scores, labels), abs=1e-12)
    total = weight = 0
    for user in users.unique().tolist():
        of_user = users == user
        area = slow_auc(scores[of_user], labels[of_user])
        if not math.isnan(area):
            total, weight = total + area * int(of_user.sum()), weight + int(of_user.sum())
    assert gauc(scores, labels, users) == pytest.approx(total / weight, abs=1e-12)
    assert gauc(scores + 100 * users, labels, users) == pytest.approx(total / weight, abs=1e-12)
    labels[10] = math.nan
    keep = ~labels.isnan()
    assert auc(scores, labels) == pytest.approx(slow_auc(scores[keep], labels[keep]), abs=1e-12)
    assert math.isnan(auc(scores, torch.ones(90)))
    assert math.isnan(gauc(scores, torch.ones(90), users))
    assert math.isnan(auc(scores[:0], labels[:0]))


def table(rows: int = 1500) -> Rows:
    """Labels that features explain: a linear model of each task."""
    categorical, dense = batch(rows)
    dense = dense.float()
    effect = torch.tensor([[2.0, -1.0], [0.0, 1.5], [-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]])
    logits = effect[categorical[:, 0]] @ torch.randn(2, 5) + dense @ torch.randn(4, 5)
    labels = (torch.rand(rows, 5) < logits.sigmoid()).float()
    return Rows(categorical, dense, labels, torch.randint(60, (rows,)))


def split(rows: Rows, at: int) -> tuple[Rows, Rows]:
    parts = [(rows.categorical, rows.dense, rows.labels, rows.users)]
    first = Rows(*(t[:at] for t in parts[0]))
    return first, Rows(*(t[at:] for t in parts[0]))


def test_fit_learns_and_keeps_the_best_epoch():
    train, valid = split(table(), 1001)
    model = build(dataclasses.replace(CONFIG, num_lora=2))
    before = evaluate(model, valid)
    history = fit(
        model, train, valid, epochs=8, batch_size=250, lr=2e-2, patience=2, progress=False
    )
    after = evaluate(model, valid)
    assert after.mean_auc > 0.75 > before.mean_auc
    best = max(history.valid, key=lambda s: s.mean_auc)
    assert history.valid[history.best_epoch] is best
    assert after == best
    assert history.train_loss[-1] < history.train_loss[0]
    assert len(history.valid) - 1 - history.best_epoch <= 2
    assert after.gauc.keys() == {"a", "b", "c", "d", "e"}


def test_fit_stops_early_and_restores():
    train, valid = split(table(300), 200)
    model = build(dataclasses.replace(CONFIG, model="mmoe"))
    history = fit(model, train, valid, epochs=50, lr=0.3, patience=1, progress=False)
    assert len(history.valid) < 50
    assert evaluate(model, valid) == history.valid[history.best_epoch]
    assert model.training


def test_fit_is_deterministic():
    train, valid = split(table(300), 200)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = build(dataclasses.replace(CONFIG, model="ple"))
        fit(model, train, valid, epochs=2, batch_size=64, seed=3, progress=False)
        results.append(predict(model, valid))
    assert torch.equal(*results)


def test_a_saved_model_predicts_the_same():
    model = make("home")
    model(*batch())
    twin = build(model.config).double()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    categorical, dense = batch()
    torch.testing.assert_close(twin.eval()(categorical, dense), model.eval()(categorical, dense))


def test_the_experiment_compares_equals():
    from bench.studies.home import claims as experiment
    from bench.studies.home.data import generated

    table = generated(3, 4000)
    rates = torch.cat([table.train.labels, table.test.labels]).mean(0)
    torch.testing.assert_close(rates, torch.tensor([0.5, 0.2, 0.05, 0.02]), atol=0.03, rtol=0)
    assert len(table.train) == 2400 and len(table.valid) == len(table.test) == 800
    arms = experiment.arms(table)
    single = {*experiment.WITHOUT, experiment.FIXED}  # of one model, to see what a part of it does
    compared = {name: config for name, config in arms.items() if name not in single}
    assert len(compared) == 6 and len(arms) == 6 + len(single)
    sizes = [experiment.parameters(build(config)) for config in compared.values()]
    assert max(sizes) < 1.05 * min(sizes)
    assert [config.expert_norm for config in compared.values()] == [False, True] * 3
