"""HoME and the models that it is compared with against their equations; who sees whom."""

from __future__ import annotations

import pytest
import torch

from moe_ops.zoo.home import HoME

from .common import batch, feature_gate, gate, make


def expert(layer, e: int, x: torch.Tensor) -> torch.Tensor:
    bank = layer.experts
    h = (x @ bank.w_gate_up[e].T + bank.b_gate_up[e]).clamp(min=0)
    y = h @ bank.w_down[e].T + bank.b_down[e]
    if layer.norm is None:
        return y.clamp(min=0)
    mean, var = y.mean(0), y.var(0, correction=0)
    z = (y - mean) / (var + 1e-5).sqrt() * layer.norm.weight[e] + layer.norm.bias[e]
    return z / (1 + (-z).exp())


def tower(model: HoME, k: int, x: torch.Tensor) -> torch.Tensor:
    bank = model.towers.bank
    h = (x @ bank.w_gate_up[k].T + bank.b_gate_up[k]).clamp(min=0)
    return (h @ bank.w_down[k].T + bank.b_down[k])[:, 0]


def home_by_hand(model: HoME, v: torch.Tensor) -> torch.Tensor:
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
