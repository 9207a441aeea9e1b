from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_ops.zoo.home import MODELS, HoMEConfig, MultiTask, build, multitask_loss
from moe_ops.zoo.multitask import FeatureGate, Features, Gates
from moe_ops.zoo.recommend import Rows, auc, evaluate, fit, gauc, predict

ROOT = Path(__file__).parents[2]
T = 13
CONFIG = HoMEConfig(
    cardinalities=(5, 3),
    num_dense=4,
    categories=(("a", "b"), ("c",), ("d", "e")),
    embedding_size=3,
    expert_hidden=6,
    expert_size=5,
    tower_hidden=4,
    num_shared=2,
    num_category=2,
    num_task=1,
)


def make(model: str, **changes) -> MultiTask:
    module = build(dataclasses.replace(CONFIG, model=model, **changes)).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def batch(rows: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    categorical = torch.stack([torch.randint(c, (rows,)) for c in CONFIG.cardinalities], dim=1)
    return categorical, torch.randn(rows, CONFIG.num_dense, dtype=torch.float64)


# ------------------------------------------------------------ the equations, written by hand


def expert(layer, e: int, x: torch.Tensor) -> torch.Tensor:
    bank = layer.experts
    h = (x @ bank.w_gate_up[e].T + bank.b_gate_up[e]).clamp(min=0)
    y = h @ bank.w_down[e].T + bank.b_down[e]
    if layer.norm is None:
        return y.clamp(min=0)
    mean, var = y.mean(0), y.var(0, correction=0)
    z = (y - mean) / (var + 1e-5).sqrt() * layer.norm.weight[e] + layer.norm.bias[e]
    return z / (1 + (-z).exp())


def gate(gates: Gates, m: int, x: torch.Tensor, allowed: list[int], outputs) -> torch.Tensor:
    """The mixture of the allowed experts by gate m."""
    logits = x @ gates.linear.weight[m].T + gates.linear.bias[m]
    if len(allowed) == 1 and gates.lone == "sigmoid":
        weights = logits[:, allowed].sigmoid()
    else:
        weights = logits[:, allowed].exp()
        weights = weights / weights.sum(-1, keepdim=True)
    return sum(weights[:, [i]] * outputs[e] for i, e in enumerate(allowed))


def feature_gate(module: FeatureGate, g: int, v: torch.Tensor) -> torch.Tensor:
    share = (v @ module.select.weight[g].T + module.select.bias[g]).softmax(-1)
    total = 0
    for l in range(module.num_lora):
        b = module.down.weight[g, l * module.rank : (l + 1) * module.rank].T  # [V, d]
        a = module.up.weight[g * module.num_lora + l].T  # [d, V]
        total = total + share[:, [l]] * 2 / (1 + (-(v @ b @ a)).exp())
    return v * total


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


# --------------------------------------------------------------------------- masks and gates


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


def test_gates_of_one_and_of_no_expert():
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    x = torch.randn(T, 4, dtype=torch.float64, requires_grad=True)
    for lone in ("sigmoid", "one"):
        gates = Gates(mask, 4, lone=lone).double()
        nn.init.normal_(gates.linear.weight)
        weights = gates(x)
        logits = torch.einsum("th,moh->tmo", x, gates.linear.weight)
        torch.testing.assert_close(weights[:, 0, :2], logits[:, 0, :2].softmax(-1))
        expected = logits[:, 1, 1].sigmoid() if lone == "sigmoid" else torch.ones_like(x[:, 0])
        torch.testing.assert_close(weights[:, 1, 1], expected)
        assert not weights[~mask.expand(T, -1, -1)].any()
        grads = torch.autograd.grad(weights.square().sum(), [x, *gates.parameters()])
        assert all(g.isfinite().all() for g in grads)
        assert not grads[1][~mask].any()
    all_lone = Gates(mask[1:2], 4)
    assert all_lone(x.float()).shape == (T, 1, 3)


def test_feature_gates_start_as_the_identity():
    gate = FeatureGate(3, 8, 2)
    v = torch.randn(T, 8)
    torch.testing.assert_close(gate(v), v[:, None].expand(-1, 3, -1))
    y = gate(v)
    y.square().sum().backward()
    assert gate.up.weight.grad.abs().min() > 0  # so training leaves the identity


@pytest.mark.parametrize("num_lora", [1, 2, 3, 4])
@pytest.mark.parametrize("own", [False, True])
def test_feature_gates_of_any_rank(own, num_lora):
    """Up to two pairs a gate are one product, more are two."""
    module = FeatureGate(3, 7, num_lora).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    v = torch.randn(T, 3, 7, dtype=torch.float64) if own else torch.randn(T, 7).double()
    read = [v[:, g] if own else v for g in range(3)]
    expected = torch.stack([feature_gate(module, g, read[g]) for g in range(3)], dim=1)
    torch.testing.assert_close(module(v), expected)


@pytest.mark.parametrize("norm", [False, True])
def test_a_trace_changes_nothing(norm):
    model = make("home", expert_norm=norm)
    categorical, dense = batch()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(categorical, dense), twin(categorical, dense, []))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_expert_norm_cures_dead_outputs():
    categorical, dense = batch(400)
    health = {}
    for norm in (False, True):
        model = make("home", expert_norm=norm)
        trace = []
        model(categorical, dense, trace)
        assert [t.outputs.shape[1:] for t in trace] == [(8, 5), (13, 5)]
        assert trace[1].gate_entropy().shape == (5,)
        health[norm] = trace[1]
    assert health[False].zero_fraction().max() > 0.2
    assert health[True].zero_fraction().max() == 0
    assert health[True].scale_ratio() < health[False].scale_ratio()


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


# ----------------------------------------------------------------------- loss, metrics, training


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
    from bench.experiments import home as experiment
    from bench.experiments.home_data import generated

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
