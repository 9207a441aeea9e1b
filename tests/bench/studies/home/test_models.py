"""The recommenders that HoME is compared with, against their equations; who sees whom."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.home.models import MODELS, RecommenderConfig
from bench.studies.home.training import Rows, fit
from tests.zoo.home.common import T, batch, gate, make
from tests.zoo.home.test_model import expert, touched, tower

from moe_ops.zoo.home import multitask_loss
from moe_ops.zoo.home.layers import Features


@pytest.mark.parametrize("norm", [False, True])
def test_ple_is_its_equations(norm):
    model = make("ple", expert_norm=norm, num_task=2)
    categorical, dense = batch()
    v = model.features(categorical, dense)
    own = {k: [2 * k, 2 * k + 1] for k in range(5)}
    shared = [10, 11]
    inputs = [v] * 6
    for level, layer in enumerate(model.stack):
        outputs = [expert(layer, e, inputs[e // 2]) for e in range(12)]
        mixed = [gate(layer.gates, k, inputs[k], own[k] + shared, outputs) for k in range(5)]
        if level == 0:
            mixed.append(gate(layer.gates, 5, inputs[5], list(range(12)), outputs))
        inputs = mixed
    expected = torch.stack([tower(model, k, inputs[k]) for k in range(5)], dim=1)
    torch.testing.assert_close(model(categorical, dense), expected)
    assert len(model.stack) == 2


def test_mmoe_adammoe_and_cgc_are_their_equations():
    categorical, dense = batch()
    for name in ("mmoe", "adammoe", "cgc"):
        model = make(name, num_shared=3)
        v = model.features(categorical, dense)
        layer = model.stack[0] if name == "cgc" else model.mixture
        count = layer.experts.num_experts
        assert count == (3 if name == "mmoe" else 8)
        outputs = [expert(layer, e, v) for e in range(count)]
        expected = []
        for k in range(5):
            allowed = [k, 5, 6, 7] if name == "cgc" else list(range(count))
            h = gate(layer.gates, k, v, allowed, outputs)
            if name == "adammoe":
                h = h + gate(layer.self_gates, k, v, [k], outputs)
            expected.append(tower(model, k, h))
        torch.testing.assert_close(model(categorical, dense), torch.stack(expected, dim=1))


def test_shared_bottom_is_one_expert():
    model = make("shared_bottom")
    categorical, dense = batch()
    h = expert(model.bottom, 0, model.features(categorical, dense))
    expected = torch.stack([tower(model, k, h) for k in range(5)], dim=1)
    torch.testing.assert_close(model(categorical, dense), expected)
    assert not any("gates" in name for name, _ in model.named_parameters())


def test_ple_and_cgc_tasks_are_apart():
    model = make("cgc", num_task=2)
    model(*batch())[:, 1].sum().backward()
    assert touched(model.stack[0].experts.w_down) == [2, 3, 10, 11]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_finite_gradients_everywhere(name):
    model = make(name)
    categorical, dense = batch()
    labels = torch.randint(2, (T, 5)).double()
    labels[3, 1] = math.nan
    loss = multitask_loss(model(categorical, dense), labels)
    loss.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
    assert model.eval()(categorical[:1], dense[:1]).shape == (1, 5)
    assert model(categorical[:0], dense[:0]).shape == (0, 5)


def test_bad_configs_and_calls(bad_input):
    with bad_input("HoMEConfig", "categories", "('a', 'a')"):
        RecommenderConfig(categories=(("a", "a"),))
    with bad_input("RecommenderConfig", "model", "'star'"):
        RecommenderConfig(model="star")
    with bad_input("HoMEConfig", "feature_gate", "'some'"):
        RecommenderConfig(feature_gate="some")
    with bad_input("HoMEConfig", "num_task", "0"):
        RecommenderConfig(num_task=0)
    with bad_input("RecommenderConfig", "num_task", "0"):
        RecommenderConfig(model="ple", num_task=0)
    with bad_input("RecommenderConfig", "num_shared", "0"):
        RecommenderConfig(model="mmoe", num_shared=0)
    with bad_input("Features", "cardinalities"):
        Features((), 0, 4)
    model = make("mmoe")
    categorical, dense = batch()
    with bad_input("Features", "columns", "[13, 1]"):
        model(categorical[:, :1], dense)
    rows = Rows(categorical + 1, dense.float(), torch.zeros(T, 5))
    with bad_input("fit", "column 0", "to 5"):
        fit(model, rows, rows, progress=False)
    rows = Rows(categorical, dense.float(), torch.zeros(T, 5))
    with bad_input("fit", "valid", "NaN"):
        fit(model.float(), rows, rows, progress=False)
    with bad_input("fit", "monitor", "f1"):
        fit(model, rows, rows, monitor="f1")
    with bad_input("Rows", "number of rows", "12"):
        Rows(categorical[1:], dense, torch.zeros(T, 5))
