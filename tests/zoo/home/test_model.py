"""HoME and the models that it is compared with against their equations; who sees whom."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.home.training import Rows, fit

from moe_ops.zoo.home import HoMEConfig, MultiTask, multitask_loss
from moe_ops.zoo.home.layers import Features
from moe_ops.zoo.home.model import MODELS

from .common import T, batch, feature_gate, gate, make


def expert(layer, e: int, x: torch.Tensor) -> torch.Tensor:
    bank = layer.experts
    h = (x @ bank.w_gate_up[e].T + bank.b_gate_up[e]).clamp(min=0)
    y = h @ bank.w_down[e].T + bank.b_down[e]
    if layer.norm is None:
        return y.clamp(min=0)
    mean, var = y.mean(0), y.var(0, correction=0)
    z = (y - mean) / (var + 1e-5).sqrt() * layer.norm.weight[e] + layer.norm.bias[e]
    return z / (1 + (-z).exp())


def tower(model: MultiTask, k: int, x: torch.Tensor) -> torch.Tensor:
    bank = model.towers.bank
    h = (x @ bank.w_gate_up[k].T + bank.b_gate_up[k]).clamp(min=0)
    return (h @ bank.w_down[k].T + bank.b_down[k])[:, 0]


def home_by_hand(model: MultiTask, v: torch.Tensor) -> torch.Tensor:
    """Three categories, two experts each, two shared ones; five tasks with one expert each."""
    config = model.config
    meta, level = model.meta, model.task_level
    of_category = {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    shared, own = [6, 7], {k: [8 + k] for k in range(5)}
    category_of = [0, 0, 1, 2, 2]
    everything = list(range(8))

    first = (
        [v] * 4
        if config.feature_gate == "none"
        else [feature_gate(model.feature_gate, g, v) for g in range(4)]
    )
    outputs = [expert(meta, e, first[e // 2]) for e in range(8)]
    z = []
    for c in range(3):
        allowed = of_category[c] + shared if config.hierarchy else everything
        z_c = gate(meta.gates, c, v, allowed, outputs)
        if config.self_gate:
            z_c = z_c + gate(meta.self_gates, c, v, of_category[c], outputs)
        z.append(z_c)
    z_shared = gate(meta.gates, 3, v, everything, outputs)
    if config.self_gate:
        z_shared = z_shared + gate(meta.self_gates, 3, v, shared, outputs)

    private = [
        feature_gate(model.task_feature_gate, k, z[c]) if config.feature_gate == "both" else z[c]
        for k, c in enumerate(category_of)
    ]
    inputs = [z[e // 2] for e in range(6)] + [z_shared] * 2 + private
    outputs = [expert(level, e, inputs[e]) for e in range(13)]
    logits = []
    for k, c in enumerate(category_of):
        allowed = of_category[c] + shared + own[k] if config.hierarchy else list(range(13))
        x = torch.cat([z[c], z_shared], dim=1)
        h = gate(level.gates, k, x, allowed, outputs)
        if config.self_gate:
            h = h + gate(level.self_gates, k, z[c], own[k], outputs)
        logits.append(tower(model, k, h))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_norm": False},
        {"hierarchy": False},
        {"feature_gate": "first"},
        {"feature_gate": "none"},
        {"self_gate": False},
        {"num_lora": 3},
    ],
)
def test_home_is_its_equations(changes):
    model = make("home", **changes)
    categorical, dense = batch()
    rows = torch.cat([categorical[:, :1], categorical[:, 1:] + 5], dim=1)
    v = torch.cat([model.features.table.weight[rows].flatten(1), dense], dim=1)
    torch.testing.assert_close(model(categorical, dense), home_by_hand(model, v))


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


def touched(parameter: torch.Tensor) -> list[int]:
    """Experts that a gradient reached."""
    grad = parameter.grad
    return [] if grad is None else grad.flatten(1).abs().amax(1).nonzero()[:, 0].tolist()


def test_no_gradient_crosses_a_forbidden_edge_of_home():
    model = make("home")
    logits = model(*batch())
    logits[:, 0].sum().backward()
    # Task a: the experts of its category, the shared ones and its own; not those of task b.
    assert touched(model.task_level.experts.w_down) == [0, 1, 6, 7, 8]
    assert touched(model.task_level.gates.linear.weight) == [0]
    weight = model.task_level.gates.linear.weight.grad[0]
    assert weight.abs().amax(1).nonzero()[:, 0].tolist() == [0, 1, 6, 7, 8]
    # The shared mixture of the first level sees all categories, as HoME has it.
    assert touched(model.meta.experts.w_down) == list(range(8))
    assert touched(model.meta.gates.linear.weight) == [0, 3]


def test_without_shared_experts_categories_are_apart():
    model = make("home", num_shared=0)
    model(*batch())[:, 2].sum().backward()
    assert touched(model.meta.experts.w_down) == [2, 3]
    assert touched(model.task_level.experts.w_down) == [2, 3, 8]
    assert touched(model.feature_gate.select.weight) == [1]
    assert touched(model.towers.bank.w_down) == [2]


def test_without_the_mask_every_expert_is_reached():
    model = make("home", hierarchy=False)
    model(*batch())[:, 2].sum().backward()
    assert touched(model.task_level.experts.w_down) == list(range(13))


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
        HoMEConfig(categories=(("a", "a"),))
    with bad_input("HoMEConfig", "model", "'star'"):
        HoMEConfig(model="star")
    with bad_input("HoMEConfig", "feature_gate", "'some'"):
        HoMEConfig(feature_gate="some")
    with bad_input("HoMEConfig", "num_task", "0"):
        HoMEConfig(num_task=0)
    with bad_input("HoMEConfig", "num_shared", "0"):
        HoMEConfig(model="mmoe", num_shared=0)
    with bad_input("Features", "cardinalities"):
        Features((), 0, 4)
    model = make("mmoe")
    categorical, dense = batch()
    with bad_input("Features", "columns", "[13, 1]"):
        model(categorical[:, :1], dense)
    rows = Rows(categorical + 1, dense.float(), torch.zeros(T, 5))
    with bad_input("Features", "column 0", "to 5"):
        fit(model, rows, rows, progress=False)
    rows = Rows(categorical, dense.float(), torch.zeros(T, 5))
    with bad_input("fit", "valid", "NaN"):
        fit(model.float(), rows, rows, progress=False)
    with bad_input("fit", "monitor", "f1"):
        fit(model, rows, rows, monitor="f1")
    with bad_input("Rows", "number of rows", "12"):
        Rows(categorical[1:], dense, torch.zeros(T, 5))
