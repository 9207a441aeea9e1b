"""Activation-aware scales, replacing banks, quality reports."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref

import pytest
import torch
from tests.helpers.moe import build_moe
from tests.helpers.quantized import weight_config
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops import quant, zoo
from moe_ops.expert_weights import ExpertInputs, ExpertWeights
from moe_ops.layers import Experts, MoE
from moe_ops.quant import QuantizedExperts, WeightConfig

H, I, E, K = 64, 96, 6, 2


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# --- activation-aware scales


def bank_and_inputs(outliers: float, tokens: int = 96):
    """A bank whose inputs have a few channels `outliers` times as large as the others."""
    x = torch.randn(tokens, H)
    x[:, :4] *= outliers
    inputs = ExpertInputs(x, torch.rand(tokens, K), torch.randint(0, E, (tokens, K)))
    w_gate_up = torch.randn(E, 2 * I, H) / H**0.5
    return ExpertWeights((w_gate_up,), torch.randn(E, H, I) / I**0.5), inputs


def test_scales_help_where_channels_differ():
    bank, inputs = bank_and_inputs(30.0)
    choice = quant.scales.find_x_scale(bank, inputs, "int4 g32")
    errors = dict(choice.errors)
    assert 0.0 < choice.exponent <= 1.0
    assert errors[choice.exponent] == min(errors.values()) < 0.5 * errors[0.0]
    # Large channels are multiplied down, and their weights up.
    assert choice.x_scale[:4].max() < choice.x_scale[4:].min()
    assert float(choice.x_scale.log().abs().max()) < math.log(1e4)


def test_scales_are_never_worse_than_none_on_their_inputs():
    bank, inputs = bank_and_inputs(1.0)
    choice = quant.scales.find_x_scale(bank, inputs, "int8", grid=4)
    errors = dict(choice.errors)
    assert list(errors) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert errors[choice.exponent] <= errors[0.0]


def test_exponent_zero_is_no_scale():
    bank, inputs = bank_and_inputs(3.0)
    choice = quant.scales.find_x_scale(bank, inputs, "int4 g32", grid=1)
    assert choice.exponent in (0.0, 1.0)
    assert choice.errors[0][0] == 0.0
    if choice.exponent == 0.0:
        assert torch.equal(choice.x_scale, torch.ones(H))


def test_inputs_that_say_nothing():
    bank, inputs = bank_and_inputs(3.0)
    for useless in (
        inputs._replace(topk_ids=torch.full_like(inputs.topk_ids, -1)),
        inputs._replace(x=torch.zeros_like(inputs.x)),
        ExpertInputs(inputs.x[:0], inputs.topk_weights[:0], inputs.topk_ids[:0]),
    ):
        choice = quant.scales.find_x_scale(bank, useless, "int4 g32")
        assert torch.equal(choice.x_scale, torch.ones(H)) and choice.errors == []


def test_channels_that_are_always_zero():
    bank, inputs = bank_and_inputs(10.0)
    inputs.x[:, 7] = 0
    choice = quant.scales.find_x_scale(bank, inputs, "int4 g32")
    assert torch.isfinite(choice.x_scale).all() and (choice.x_scale > 0).all()


def test_calibrated_output_is_closer_on_other_tokens():
    torch.manual_seed(3)
    experts = Experts(E, H, I).eval()
    scale = torch.ones(H)
    scale[::9] = 25.0

    def batch():
        return torch.randn(128, H) * scale, torch.rand(128, K), torch.randint(0, E, (128, K))

    other = batch()
    with torch.no_grad():
        want = experts(*other)
        plain = moe_ops.quantize(experts, moe_ops.Int4WeightConfig(32))
        aware = moe_ops.quantize(experts, moe_ops.Int4WeightConfig(32), calibration=[batch()])
        # Of the error, what w_down adds stays.
        assert relative(aware(*other), want) < 0.9 * relative(plain(*other), want)
    assert aware.scale_exponent > 0 and plain.scale_exponent is None


# --- replacing banks


class Net(torch.nn.Module):
    """Two layers, of which one bank is used twice, and a part that is no bank."""

    def __init__(self, intermediate: int = I):
        super().__init__()
        self.first = build_moe(H, intermediate, E, K)
        self.second = build_moe(H, intermediate, E, K)
        self.again = MoE(self.first.router, self.first.experts)
        self.head = torch.nn.Linear(H, 11)

    def forward(self, x):
        for layer in (self.first, self.second, self.again):
            x = x + layer(x)
        return self.head(x)


def test_whole_model_in_place():
    model = Net().eval()
    x = torch.randn(2, 8, H)
    with torch.no_grad():
        want = model(x)
        seen = []
        assert (
            moe_ops.quantize(model, moe_ops.Int8WeightConfig(), progress=lambda *a: seen.append(a))
            is model
        )
        assert relative(model(x), want) < 0.05
    assert seen == [("first.experts", 0, 2), ("second.experts", 1, 2)]
    assert model.first.experts is model.again.experts
    assert not any(isinstance(m, Experts) for m in model.modules())
    assert model.head.weight.dtype == torch.float32


def test_float_weights_go():
    model = Net()
    alive = [weakref.ref(b) for b in (model.first.experts, model.second.experts)]
    storages = [weakref.ref(p) for m in (model.first, model.second) for p in m.experts.parameters()]

    def progress(name, done, total):
        gc.collect()
        # The bank before this one is gone before this one is begun.
        assert [ref() is None for ref in alive] == [i < done for i in range(total)]

    moe_ops.quantize(model, moe_ops.Int4WeightConfig(32), progress=progress)
    gc.collect()
    assert all(ref() is None for ref in (*alive, *storages))


def test_calibration_of_a_model():
    model = Net().eval()
    moe_ops.quantize(
        model,
        moe_ops.Int4WeightConfig(32),
        calibration=[torch.randn(2, 8, H), torch.randn(1, 3, H)],
    )
    for layer in (model.first, model.second):
        assert layer.experts.x_scale.shape == (H,)
        assert 0 <= layer.experts.scale_exponent <= 1
    assert not model.training


def test_calibration_keeps_the_mode_and_counts_nothing():
    model = Net().train()
    model.second.eval()
    quant.collect_calibration(model, lambda m: m(torch.randn(4, H)))
    assert model.training and model.first.training and not model.second.training
    assert not model._forward_pre_hooks and not model.first.experts._forward_pre_hooks


@pytest.mark.parametrize("max_tokens", [1, 7, 16, 100])
def test_tokens_are_spread(max_tokens):
    model = Net().eval()
    batches = [torch.full((1, 10, H), float(i + 1)) for i in range(3)]
    baseline = quant.collect_calibration(model, iter(batches), max_tokens=max_tokens)
    for name, calls in (("first.experts", 2), ("second.experts", 1)):
        record = baseline.banks[name]
        assert record.inputs.x.shape[0] == min(max_tokens, 30 * calls)
    record = baseline.banks["first.experts"]
    if max_tokens >= 3:
        assert {1.0, 2.0, 3.0} <= set(record.inputs.x[:, 0].tolist())
    assert record.y.shape == record.inputs.x.shape


def test_recorded_output_is_the_banks():
    model = Net().eval()
    x = torch.randn(1, 9, H)
    outputs = []
    model.second.experts.register_forward_hook(lambda m, a, y: outputs.append(y.detach()))
    record = quant.collect_calibration(model, [x]).banks["second.experts"]
    torch.testing.assert_close(record.y, outputs[0], rtol=1e-5, atol=1e-6)


def test_dense_layers_too():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), Net().first, torch.nn.Linear(128, 8))
    experts = model[1].experts
    config = moe_ops.Int4WeightConfig(64)
    assert moe_ops.quantize(model, config, modules="linears") is model
    # Small layers stay float; 96 has no groups of 64.
    assert isinstance(model[0], quant.QuantizedLinear) and model[0].format == "int4 g32"
    assert type(model[2]) is torch.nn.Linear and model[1].experts is experts
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), Net().first, torch.nn.Linear(64, 32))
    moe_ops.quantize(model, quant.Fp8WeightConfig(), modules="all", skip="2")
    assert model[0].format == model[1].experts.format == "fp8"
    assert type(model[2]) is torch.nn.Linear
    x = torch.randn(5, 128)
    with torch.no_grad():
        torch.testing.assert_close(
            model[0](x), torch.nn.functional.linear(x, model[0].weight, model[0].bias)
        )
    with pytest.raises(ValueError, match=r"quantize: calibration must be None for linears"):
        moe_ops.quantize(model, config, modules="linears", calibration=[x])


def test_skip():
    model = Net()
    moe_ops.quantize(model, moe_ops.Int8WeightConfig(), skip="sec*")
    assert isinstance(model.first.experts, QuantizedExperts)
    assert isinstance(model.second.experts, Experts)
    moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))
    assert model.second.experts.format == "int4 g32" and model.first.experts.format == "int8"


def test_skip_that_matches_no_bank():
    with pytest.warns(
        UserWarning, match=r"skip must match the name of a layer, got 'first', which"
    ):
        moe_ops.quantize(Net(), moe_ops.Int8WeightConfig(), skip=["first", "second.*"])


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, r"hold float experts, got Linear without"),
        (lambda: moe_ops.quantize(Net(), moe_ops.Int8WeightConfig()), {}, r"got Net without any"),
        (Net, {"config": "int8"}, r"config must be an Int8WeightConfig, .*, got 'int8'"),
        (Net, {"config": WeightConfig()}, r"config must be an Int8WeightConfig, .*, got WeightC"),
        (Net, {"modules": "heads"}, r"modules must be one of experts, linears, all, got 'heads'"),
        (lambda: torch.nn.Sequential(), {"modules": "linears"}, r"must hold dense layers, got Seq"),
        (Net, {}, r"first.experts's w_down must be a multiple of 64 for int4 g64, got 96; .* g32"),
        (
            lambda: Net().to("meta"),
            {"config": moe_ops.Int8WeightConfig()},
            r"first.experts.w_gate_up must hold numbers, got a meta tensor",
        ),
        (
            Net,
            {"config": moe_ops.Int8WeightConfig(), "calibration": quant.CalibrationData({})},
            r"calibration must come from this model, got none for 'first.experts'",
        ),
    ],
)
def test_what_cannot_be_replaced(build, kwargs, message):
    model = build()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"quantize: .*{message}"):
        moe_ops.quantize(model, **{"config": moe_ops.Int4WeightConfig(), **kwargs})
    assert list(model.state_dict()) == before


def on_another_device(weight):
    with FakeTensorMode():  # There need not be one.
        return torch.empty(weight.shape, device="xpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to("meta"), r"must hold numbers, got a meta tensor; load all weights"),
        (
            on_another_device,
            r"must be on the CPU or on CUDA, where .* run, got xpu:0; call model.cpu",
        ),
        (lambda w: w.to(torch.float8_e4m3fn), r"must be float64, .* got float8_e4m3fn"),
        (lambda w: w.new_empty(0), r"must be \[E, H, I\], got shape \[0\]"),
    ],
)
def test_weights_that_are_not_here(change, message):
    """Half-built, moved, stored otherwise, or taken away by what shards a model (FSDP1, ZeRO-3)."""
    model = Net()
    experts = model.second.experts
    experts.w_down = torch.nn.Parameter(change(experts.w_down.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=rf"^quantize: second.experts.w_down {message}"):
        moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    assert isinstance(model.first.experts, Experts)


@pytest.mark.parametrize("name", ["w_gate_up", "w_down"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("calibrated", [False, True])
def test_numbers_that_are_not_finite(name, value, calibrated):
    model = Net()
    x = torch.randn(40, 64)
    calibration = quant.collect_calibration(model, [x], outputs=False) if calibrated else None
    with torch.no_grad():
        getattr(model.second.experts, name)[2, 3, 5] = value
    message = f"quantize: second.experts.{name} must be finite, got infinities or NaNs in expert 2."
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        moe_ops.quantize(model, moe_ops.Int8WeightConfig(), calibration=calibration)
    assert isinstance(model.first.experts, QuantizedExperts)  # Banks before it are done.
    assert isinstance(model.second.experts, Experts)


def test_calibration_has_to_reach_every_bank():
    with pytest.raises(ValueError, match=r"must reach every bank, got no token for 'first"):
        quant.collect_calibration(Net(), [])


# --- quality


class Bigram(torch.nn.Module):
    """Logits from a table: the perplexity is known in closed form."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids):
        return self.table[ids]


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("context", [2, 7, 64])
def test_perplexity(wrap, context):
    table = torch.randn(9, 9)
    tokens = torch.randint(0, 9, (50,))
    model = Bigram(table)
    log_p = table.log_softmax(-1)
    pairs = [(i, i + 1) for i in range(49) if (i + 1) % context]
    want = math.exp(-sum(float(log_p[tokens[a], tokens[b]]) for a, b in pairs) / len(pairs))
    got = quant.perplexity(
        model, tokens, context=context, batch_size=3, forward=lambda m, ids: wrap(m(ids))
    )
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), {}, r"at least 2 integers \[N\], got shape \[1\]"),
        (torch.zeros(2, 4, dtype=torch.int64), {}, r"got shape \[2, 4\]"),
        (torch.zeros(8, dtype=torch.int64), {"context": 1}, r"context must be at least 2, got 1"),
    ],
)
def test_perplexity_bad_input(tokens, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quant.perplexity(Bigram(torch.zeros(2, 2)), tokens, **kwargs)


def language_model():
    return zoo.create_model(
        "deepseek",
        "tiny_v1",
        hidden_size=32,
        head_size=16,
        num_heads=2,
        num_dense_layers=0,
        num_experts=4,
        top_k=2,
        num_shared_experts=0,
        intermediate_size=64,
    ).eval()


def test_report_of_a_language_model():
    model = language_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.experts.w_down.normal_()
    tokens = torch.randint(0, 256, (200,))
    batches = [tokens[None, :32], tokens[None, 32:64]]
    baseline = quant.collect_calibration(model, batches, tokens=tokens, context=32)
    before = quant.perplexity(model, tokens, context=32)
    reports = {}
    for format, group_size in (("int8", None), ("int4", 32)):
        copied = language_model()
        copied.load_state_dict(model.state_dict())
        moe_ops.quantize(copied, weight_config(format, group_size))
        reports[format] = quant.compare_quality(copied, baseline)
    report = reports["int8"]
    assert report.perplexity_before == before
    assert report.perplexity_after != before
    assert report.perplexity_after == pytest.approx(before, rel=0.2)
    assert [b.name for b in report.banks] == [f"layers.{i}.mlp.experts" for i in (0, 1)]
    assert all(0 < b.error < 0.05 for b in report.banks)
    assert all(a.error < b.error for a, b in zip(report.banks, reports["int4"].banks, strict=True))
    assert report.bytes_before == 2 * 4 * (4 * 3 * 32 * 64)
    # 8 of 32 bits, and a scale of 4 bytes for each 32 or 64 numbers.
    assert 0.25 < report.bytes_after / report.bytes_before < 0.32
    text = str(report)
    assert "layers.1.mlp.experts" in text and "perplexity" in text and "int8" in text
    assert json.loads(json.dumps(report.to_dict()))["banks"][0]["format"] == "int8"


def test_report_needs_outputs_and_the_same_model():
    model = Net().eval()
    x = [torch.randn(4, H)]
    without = quant.collect_calibration(model, x, outputs=False)
    good = quant.collect_calibration(model, x)
    with pytest.raises(ValueError, match=r"must hold quantized experts, got Net without any"):
        quant.compare_quality(model, good)
    moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    with pytest.raises(ValueError, match=r"baseline must have outputs, got one without"):
        quant.compare_quality(model, without)
    with pytest.raises(ValueError, match=r"must be of this model, got a bank 'first.experts'"):
        quant.compare_quality(torch.nn.Linear(2, 2), good)
